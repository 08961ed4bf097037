#!/usr/bin/env bash
# Submits data preparation, training and evaluation; each starts when the previous step succeeds.
#
#   PARTS=16 slurm/pipeline.sh --nodes 4 --gpus-per-node 8 -- \
#       configs/data_prep/images.yaml configs/pretrain/images.yaml configs/eval/images.yaml
#
# Options before -- are passed to sbatch for training and evaluation. Separate the configs of several
# datasets by commas. The shards of each dataset are written by PARTS jobs with CPUS cores each.
set -euo pipefail

options=()
while [ "$1" != -- ]; do
    options+=("$1")
    shift
done
data_preps=$2 pretrain=$3 evaluate=$4
submit() { sbatch --parsable --kill-on-invalid-dep=yes "$@"; }

finalized='' cpus=${CPUS:-8}
IFS=, read -ra data_preps <<< "$data_preps"
for config in "${data_preps[@]}"; do
    parts=$(submit --cpus-per-task="$cpus" --array="0-$((${PARTS:-1} - 1))" \
        slurm/data_prep.sbatch "$config")
    finalize=$(submit --cpus-per-task="$cpus" --dependency="afterok:$parts" \
        slurm/data_prep.sbatch finalize "$config")
    finalized+=:$finalize
    echo "$config: shards $parts, finalize $finalize"
done
training=$(submit "${options[@]}" --dependency="afterok$finalized" slurm/pretrain.sbatch "$pretrain")
evaluation=$(submit "${options[@]}" --dependency="afterok:$training" slurm/evaluate.sbatch "$evaluate")
echo "training $training, evaluation $evaluation"
