#!/usr/bin/env bash
# Submits everything, each step after the one before: shards, training, evaluation.
#
#   PARTS=16 slurm/pipeline.sh --nodes 4 --gpus-per-node 8 -- \
#       configs/data_prep/images.yaml configs/pretrain/images.yaml configs/eval/images.yaml
#
# What stands before -- goes to sbatch for training and evaluation.
set -euo pipefail

options=()
while [ "$1" != -- ]; do
    options+=("$1")
    shift
done
data_prep=$2 pretrain=$3 evaluate=$4
submit() { sbatch --parsable --kill-on-invalid-dep=yes "$@"; }

parts=$(submit --array="0-$((${PARTS:-1} - 1))" slurm/data_prep.sbatch "$data_prep")
finalize=$(submit --dependency="afterok:$parts" slurm/data_prep.sbatch finalize "$data_prep")
training=$(submit "${options[@]}" --dependency="afterok:$finalize" slurm/pretrain.sbatch "$pretrain")
evaluation=$(submit "${options[@]}" --dependency="afterok:$training" slurm/evaluate.sbatch "$evaluate")
echo "shards $parts, finalize $finalize, training $training, evaluation $evaluation"
