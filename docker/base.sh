#!/usr/bin/env bash
# Stands in for the base image and the package index, where neither can be reached from a build.
#
#   docker/base.sh [NAME]    makes the image NAME (none-defense-base) from Debian's packages, and
#                            docker/wheelhouse with everything that the image installs
#
# Then: make deploy BASE=none-defense-base. It needs mmdebstrap, a Docker engine, and Python 3.11
# with pip, whose settings (an index of one's own, say) hold here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name=${1:-none-defense-base}
packages=python3,python3-pip,python3-venv,python-is-python3,ca-certificates

echo "making the image $name from Debian's packages"
mmdebstrap --variant=minbase --include="$packages" bookworm - \
	| docker import --change 'ENV PIP_BREAK_SYSTEM_PACKAGES=1' - "$name"

echo "fetching wheels into docker/wheelhouse"
# The versions of the locks; their hashes are compared when the image is made.
fetch() {
	python3.11 -m pip download --quiet --only-binary :all: --no-deps --dest docker/wheelhouse "$@"
}
fetch -c constraints.txt torch
fetch --require-hashes -r docker/requirements.lock
if ! ls docker/wheelhouse/torch-*+cpu*.whl >/dev/null 2>&1; then
	fetch --require-hashes -r docker/cuda.lock
fi
