#!/usr/bin/env bash
# A Ray node in a container, for lockstep's ray backend: once with --head, then with --worker on every other host.
# It stays until it is interrupted, and takes its container with it.
set -euo pipefail

usage() {
  cat >&2 <<'TEXT'
usage: run_cluster.sh IMAGE HEAD_ADDRESS --head|--worker [DOCKER_ARGUMENT...]

IMAGE            one with lockstep and Ray, the same on all hosts (deploy/Dockerfile says how to build it)
HEAD_ADDRESS     the head's address, as the other hosts reach it
DOCKER_ARGUMENT  handed on to `docker run`, like: --gpus all -v /models:/models

Set in the environment:
  RAY_PORT=6379         Ray's port on the head, the same on all hosts
  SHM_SIZE=8g           shared memory of the container: Ray's objects, and what ranks of one host exchange
  CONTAINER=...         the container's name; default: lockstep-ray-head or lockstep-ray-worker
  LOCKSTEP_HOST_IP=...  this host's address, where it has several; the head's is HEAD_ADDRESS
  RAY_AUTH_MODE=token RAY_AUTH_TOKEN=...  a secret, the same on all hosts: without it whoever reaches Ray's port runs what they like
  LOCKSTEP_CLUSTER_KEY=...  a secret, the same on all hosts, where hosts are joined in these containers without Ray

Then, on the head's host:
  docker exec lockstep-ray-head lockstep generate --distributed-executor-backend ray -tp 2 -pp 2 --prompt "def add(a, b):"
TEXT
  exit 2
}

fail() {
  echo "error: $1" >&2
  usage
}

[[ $# -ge 1 ]] || usage
[[ -n $1 && $1 != -* ]] || fail "IMAGE comes first, not '$1'"
[[ $# -ge 2 && -n $2 && $2 != -* ]] || fail "HEAD_ADDRESS is missing: the head's address, as the other hosts reach it"
[[ ! $2 =~ [[:space:]/] ]] || fail "HEAD_ADDRESS='$2' is no address: give a name or an IP address alone"
[[ $# -ge 3 ]] || fail "the third argument is missing: --head or --worker"
image=$1 head=$2 role=$3
shift 3
port=${RAY_PORT:-6379} host_ip=${LOCKSTEP_HOST_IP:-}
[[ $port =~ ^[1-9][0-9]{0,4}$ ]] && ((port <= 65535)) || fail "RAY_PORT='$port' is not a port: 1 to 65535"
case $role in
  --head)
    host_ip=$head
    start=(ray start --block --head "--node-ip-address=$head" "--port=$port")
    ;;
  --worker)
    start=(ray start --block "--address=$head:$port")
    [[ -z $host_ip ]] || start+=("--node-ip-address=$host_ip")
    ;;
  *) fail "'$role' is neither --head nor --worker" ;;
esac
secrets=()
for name in LOCKSTEP_CLUSTER_KEY RAY_AUTH_MODE RAY_AUTH_TOKEN; do
  [[ -z ${!name:-} ]] || secrets+=(--env "$name") # by name alone: a command line can be read by everyone on the host
done
[[ ${RAY_AUTH_MODE:-} == token ]] || echo "warning: RAY_AUTH_MODE=token is not set: whoever reaches Ray's port can run programs here" >&2
command -v docker >/dev/null || {
  echo "error: there is no 'docker' command on this host" >&2
  exit 1
}

scratch=$(mktemp -d) running=
remove() { # only a container that this run made: one of the same name may be another's
  for _ in {1..50}; do # it may be in the making just now
    [[ -n $running && ! -s $scratch/id ]] && kill -0 "$running" 2>/dev/null || break
    sleep 0.1
  done
  if [[ -s $scratch/id ]]; then
    docker rm --force "$(cat "$scratch/id")" >/dev/null 2>&1 || true
  fi
  if [[ -n $running ]]; then # still pulling the image, or ending with its container
    kill "$running" 2>/dev/null || true
  fi
  rm -rf "$scratch"
}
trap remove EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# In the background, because bash runs a trap only after a command in the foreground has ended.
docker run --rm --init --cidfile "$scratch/id" --name "${CONTAINER:-lockstep-ray-${role#--}}" --network host \
  --shm-size "${SHM_SIZE:-8g}" ${host_ip:+--env "LOCKSTEP_HOST_IP=$host_ip"} \
  ${secrets[@]+"${secrets[@]}"} "$@" --entrypoint "${start[0]}" "$image" "${start[@]:1}" &
running=$!
wait "$running"
