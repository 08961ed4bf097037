# shellcheck shell=bash disable=SC2034
# What differs between clusters; the scripts beside this one read it. Edit it once.

# The environment that isopair is installed in.
PYTHON=${PYTHON:-"$ISOPAIR/.venv/bin/python"}
# module load cuda/13.0                         # what your site needs for NCCL and drivers
# export XDG_CACHE_HOME=/scratch/$USER/cache    # fetched checkpoints and evaluation sets

# The network that processes talk over, where there are several.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# To run in a container, or under another wrapper, put it before the command.
WRAPPER=()                                      # WRAPPER=(apptainer exec --nv isopair.sif)

# Settings of every training run here: where a node keeps shards that it fetches from URLs, say.
PRETRAIN_OPTIONS=()                             # (loading.cache.folder="/scratch/$USER/shards")

# For sbatch and srun: account, partition and the like, which jobs take unless told otherwise.
# export SBATCH_ACCOUNT=mine SBATCH_PARTITION=gpu

# Check the nodes before each start, and leave bad ones out (python -m pretrain.preflight)? 1 or 0.
PREFLIGHT=${PREFLIGHT:-1}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONFAULTHANDLER=1                     # a process that dies of a signal says where
