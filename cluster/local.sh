#!/bin/sh
# Starts the cluster of local.yaml and stays until Ctrl-C. `make cluster` calls it with the project's `ray`.
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"   # of cifar.local_nodes

export RAY_AUTH_MODE=token
[ -s ~/.ray/auth_token ] || (umask 077 && ray get-auth-token --generate >/dev/null 2>&1)

# What Ray's provider of local nodes needs.
export RAY_FAKE_CLUSTER=1 RAY_enable_autoscaler_v2=1
export RAY_CLOUD_INSTANCE_ID=fffffffffffffffffffffffffffffffffffffffffffffffffff00000
export AUTOSCALER_UPDATE_INTERVAL_S=1
# Otherwise Ray puts this machine's address for 127.0.0.1, and others could reach it.
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
# As on the other clusters: with the defaults a lost node was not noticed in 75 s, with these in 27 to 30 s.
export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=1500
export RAY_health_check_failure_threshold=3 RAY_health_check_initial_delay_ms=2000

cat <<'END'
In another terminal, with the project's environment (. .venv/bin/activate):

  export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265
  ray job submit --working-dir . -- python jobs/train.py --data digits --workers 3 --storage ~/runs
  ray get-auth-token                # the dashboard, http://127.0.0.1:8265, asks for it

Ctrl-C here ends the cluster.

END
exec ray start --head --block --disable-usage-stats --node-ip-address=127.0.0.1 --port=6379 --num-cpus=0 --num-gpus=0 \
    --object-store-memory=500000000 --autoscaling-config="$PWD/cluster/local.yaml"
