# shellcheck shell=bash disable=SC2034
# Cluster-specific settings, read by the other scripts in this folder. Edit once.

# Python interpreter of the environment in which isopair is installed.
PYTHON=${PYTHON:-"$ISOPAIR/.venv/bin/python"}
# module load cuda/13.0                         # modules required by NCCL and the drivers
# export XDG_CACHE_HOME=/scratch/$USER/cache    # downloaded checkpoints and evaluation sets

# Network interface for communication between processes, if nodes have several.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Prefix of every Python command, such as a container.
WRAPPER=()                                      # WRAPPER=(apptainer exec --nv isopair.sif)

# Config overrides for every training run, such as a node-local cache for shards from URLs.
PRETRAIN_OPTIONS=()                             # (loading.cache.folder="/scratch/$USER/shards")

# Defaults for sbatch and srun, such as account and partition.
# export SBATCH_ACCOUNT=mine SBATCH_PARTITION=gpu

# 1: check nodes and exclude bad ones before each start (python -m pretrain.preflight). 0: skip.
PREFLIGHT=${PREFLIGHT:-1}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONFAULTHANDLER=1                     # traceback of processes killed by a signal
