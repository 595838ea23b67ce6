#!/bin/bash
# Trains the paper's network on four machines with eight GPUs each, under Slurm:
#
#     sbatch recipes/slurm.sh
#     sbatch recipes/slurm.sh recipes/owt.yaml runs/owt-s16 model.block_size=16
#
# The arguments are a recipe, the run's directory (visible to all machines) and overrides. Submit
# it again after its time is over to resume the run.
#SBATCH --job-name=blockdiffusion
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
set -eu

recipe=${1:-recipes/owt-base.yaml}
out=${2:-runs/owt-base}
resume=
if [ -e "$out/config.yaml" ]; then resume=--resume; fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One torchrun on each machine; it starts a process for each GPU.
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m blockdiffusion.cli train "$recipe" "out=$out" "${@:3}" $resume
