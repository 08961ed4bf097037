# shellcheck shell=bash
# Sourced at the start of every job: locates the project, reads site.sh, and logs the job's nodes.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
ISOPAIR=${ISOPAIR:-$PWD}                        # checkout of the project
. "$ISOPAIR/slurm/site.sh"
echo "job ${SLURM_JOB_ID:-none} on ${SLURM_JOB_NODELIST:-$(hostname)}," \
    "start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date -Is): $*"

# One process per GPU of each node; on nodes without GPUs, as many as --ntasks-per-node.
tasks_per_node() {
    echo "${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}"
}
