#!/usr/bin/env bash
# What differs between clusters, for all the batch scripts. Change it here.
# shellcheck disable=SC2034  # the scripts use the variables

# Modules, if the cluster has them:
#   module load cuda/12.8

# The interpreter. In a container: the container's own.
PYTHON=${PYTHON:-python}

# Options of srun, for example for pyxis' containers. A container needs the folders with the code, data and runs.
#   SRUN_OPTIONS=(--container-image="$HOME/rf_train.sqsh" --container-mounts="$PWD" --container-workdir="$PWD")
SRUN_OPTIONS=()

# A command that runs each task, for example in apptainer's containers. --nv gives them the GPUs.
#   INSIDE=(apptainer exec --nv --bind "$PWD" "$HOME/rf_train.sif")
INSIDE=()

# NCCL, which carries the collectives between GPUs. It finds the fastest way by itself on most clusters.
#   export NCCL_DEBUG=INFO               # logs which adapters and ways it has found: look here first
#   export NCCL_SOCKET_IFNAME=ib0        # the interface through which ranks find one another, if it takes a wrong one
#   export NCCL_IB_HCA=mlx5_0,mlx5_1     # the InfiniBand adapters to use, if others are there for storage
#   export NCCL_IB_DISABLE=1             # TCP instead of InfiniBand: slow, to see whether InfiniBand is what fails
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
