# shellcheck shell=bash disable=SC2034
# Settings that differ between clusters, read by the other scripts in this folder. Edit once.

# Python of the environment that isopair is installed in.
PYTHON=${PYTHON:-"$ISOPAIR/.venv/bin/python"}
# module load cuda/13.0                         # modules that NCCL and drivers need
# export XDG_CACHE_HOME=/scratch/$USER/cache    # fetched checkpoints and evaluation sets

# Network interface between processes, if nodes have several.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Command in front of every Python command, such as a container.
WRAPPER=()                                      # WRAPPER=(apptainer exec --nv isopair.sif)

# Config overrides of every training run, such as where a node caches shards from URLs.
PRETRAIN_OPTIONS=()                             # (loading.cache.folder="/scratch/$USER/shards")

# Defaults for sbatch and srun, such as account and partition.
# export SBATCH_ACCOUNT=mine SBATCH_PARTITION=gpu

# 1: check nodes before each start and leave bad ones out (python -m pretrain.preflight). 0: do not.
PREFLIGHT=${PREFLIGHT:-1}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONFAULTHANDLER=1                     # traceback of a process that a signal kills
