#!/bin/bash
# The same command on every host of a Cloud TPU pod; JAX finds the others by itself.
#     TPU=my-pod ZONE=us-central2-b scripts/tpu_pod.sh --config=configs/split_cifar10.py --workdir=/mnt/shared/runs/cifar
set -euo pipefail
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
    --command="cd jaxcl && .venv/bin/python -m jaxcl train --distributed $(printf '%q ' "$@")"
