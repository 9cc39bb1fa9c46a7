#!/usr/bin/env bash
# One run on a Cloud TPU slice (v2 to v6e), all hosts of it.
#
#   export NAME=at ZONE=us-central2-b TYPE=v4-32 VERSION=tpu-ubuntu2204-base
#   launch/tpu_vm.sh create
#   launch/tpu_vm.sh setup                      copies this checkout and installs it; again after every edit
#   launch/tpu_vm.sh run --config=configs/at_cifar.py --workdir=/mnt/runs/at_cifar
#   launch/tpu_vm.sh delete
#
# --dry_run as the first argument, or DRY_RUN=1, prints the commands and starts nothing.
# VERSION: tpu-ubuntu2204-base for v4 and before, v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p,
# v2-alpha-tpuv6e for v6e. PROJECT: the Google Cloud project, if not gcloud's default. SPOT=1: a spot slice,
# cheaper and preemptible. On more than one host the workdir is on a file system that all hosts see
# (Filestore, for example). The processes find each other through the TPU's own variables. A run that was
# interrupted goes on when it is started again.
set -euo pipefail

usage="usage: NAME=... ZONE=... launch/tpu_vm.sh [--dry_run] create|setup|run|delete [arguments of the run]"

say_or_do() {
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpu() { # tpu ACTION ARGUMENTS...
  say_or_do gcloud compute tpus tpu-vm "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}
}

if [[ ${1:-} == --dry_run ]]; then
  DRY_RUN=1
  shift
fi
if [[ $# -eq 0 || -z ${NAME:-} || -z ${ZONE:-} ]]; then
  echo "$usage" >&2
  exit 2
fi
action=$1
shift

case $action in
  create)
    if [[ -z ${TYPE:-} || -z ${VERSION:-} ]]; then
      echo "create needs TYPE (v4-32, v5litepod-16, ...) and VERSION (tpu-ubuntu2204-base, ...)" >&2
      exit 2
    fi
    spot=
    if [[ ${SPOT:-0} == 1 ]]; then spot=--spot; fi
    tpu create "$NAME" --accelerator-type="$TYPE" --version="$VERSION" ${spot:+"$spot"}
    ;;
  setup)
    archive=$(mktemp -d)/jax_trustdiff.tar.gz
    trap 'rm -rf "$(dirname "$archive")"' EXIT
    say_or_do tar -C "$(dirname "$0")/.." -czf "$archive" --exclude=.git --exclude=runs --exclude='.venv*' \
      --exclude=__pycache__ .
    tpu scp "$archive" "$NAME:jax_trustdiff.tar.gz" --worker=all
    # The images come with Python 3.10; uv brings a newer one.
    tpu ssh "$NAME" --worker=all --command="set -e
mkdir -p jax_trustdiff
tar -C jax_trustdiff -xzf jax_trustdiff.tar.gz
python3 -m pip install --user --quiet uv
test -d .venv-trustdiff || python3 -m uv venv --quiet --python 3.12 .venv-trustdiff
python3 -m uv pip install --quiet --python .venv-trustdiff/bin/python -e 'jax_trustdiff[tpu]'"
    ;;
  run)
    if [[ $# -eq 0 ]]; then
      echo "run needs --config=RECIPE" >&2
      exit 2
    fi
    python=../.venv-trustdiff/bin/python
    tpu ssh "$NAME" --worker=all \
      --command="cd jax_trustdiff && exec $python -m jax_trustdiff.main $(printf '%q ' "$@")"
    ;;
  delete)
    tpu delete "$NAME" --quiet
    ;;
  *)
    echo "unknown action '$action'. $usage" >&2
    exit 2
    ;;
esac
