"""What is learned: data sets, partitions, models, triggers and poisoning, and BA and ASR."""
