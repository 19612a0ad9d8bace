#!/usr/bin/env bash
# Prints its parameters, the env_variables of the worker_config.
set -euo pipefail

: "${MY_FIRST_PARAM:?is not set; pass it in worker_config.env_variables}"
: "${MY_SECOND_PARAM:?is not set; pass it in worker_config.env_variables}"

echo "MY_FIRST_PARAM=$MY_FIRST_PARAM"
echo "MY_SECOND_PARAM=$MY_SECOND_PARAM"
