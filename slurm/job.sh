# shellcheck shell=bash
# What all jobs do first: find the project, read the site's settings, and say where they run.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
ISOPAIR=${ISOPAIR:-$PWD}                        # where the project is checked out
. "$ISOPAIR/slurm/site.sh"
echo "job ${SLURM_JOB_ID:-none} on ${SLURM_JOB_NODELIST:-$(hostname)}," \
    "start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date -Is): $*"

# A process per GPU of each node; on nodes without, per task that was asked for.
tasks_per_node() {
    echo "${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}"
}
