"""Training on one machine: NONE beside plain training and the defences that its paper compares."""
