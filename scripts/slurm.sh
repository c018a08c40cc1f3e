#!/bin/bash
# One process a node (or, with --gpus-per-task=1 and --ntasks-per-node, one a GPU); JAX asks SLURM for the others.
#     sbatch scripts/slurm.sh --config=configs/split_cifar10.py --workdir=/shared/runs/cifar
#SBATCH --job-name=jaxcl
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=jaxcl-%j.out
#SBATCH --open-mode=append

# --signal reaches the tasks of srun 120 s before the time is up: they save, within 100 s, and end with 75, or 143 before Python
# has begun. A lost process ends the others with 69 or 134, a crash of native code ends with 139. In all these cases the job is
# queued again and continues from the last checkpoint.
srun --kill-on-bad-exit=0 --label python -m jaxcl train --distributed --stop_seconds=100 "$@"
status=$?
case $status in
    69 | 75 | 134 | 137 | 139 | 143) scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit $status
