#!/usr/bin/env bash
# What the batch scripts share. They source it from the folder that they are submitted from.
# shellcheck disable=SC2034  # the scripts use the variables

# A job that stops sooner than this after its start is not requeued by its script: it would stop again.
MIN_SECONDS=${MIN_SECONDS:-300}

# Ends the script with one line.
fail() {
  echo "error: $1" >&2
  exit 2
}

# Whether Slurm has told this job that another one will take its place.
preempted() {
  [[ $(scontrol show job "$SLURM_JOB_ID") == *PreemptTime=[0-9]* ]]
}

# Puts this job back into the queue, where Slurm wouldn't do so by itself. $1: the reason, for the log. Slurm ends the
# job then, and sends TERM to scontrol, too, which must live to say whether it was done.
requeue() {
  if [ "$SECONDS" -lt "$MIN_SECONDS" ] && ! preempted; then
    echo "error: $1 after only $SECONDS s: not requeued. Is --time long enough, and longer than --signal's?" >&2
  elif (trap '' TERM && exec scontrol requeue "$SLURM_JOB_ID"); then
    echo "$1 after $SECONDS s: requeued"
  else
    echo "error: $1, and Slurm refuses to requeue; submit the same command again, it goes on" >&2
  fi
}

# The first lines of a task that computes on a GPU: without one it would go on, for weeks, on the CPU.
# shellcheck disable=SC2016  # the task expands it
GPU_OR_ERROR='
  if [ "${DS_ACCELERATOR:-}" != cpu ] && ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo "error: $(hostname): no GPU that this task can use (nvidia-smi -L); on CPUs set DS_ACCELERATOR=cpu" >&2
    exit 2
  fi
'

# Since Slurm 22.05 srun doesn't take this from sbatch. Without it, many clusters give each task one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-8}
# Where sbatch passes no variables on, srun would pass on none of these scripts' own.
export SLURM_EXPORT_ENV=ALL

SITE=${SITE:-slurm/site.sh}
[ -r "$SITE" ] || fail "no $SITE in $PWD; submit from the project's folder, or set SITE"
# shellcheck source=slurm/site.sh
source "$SITE"
