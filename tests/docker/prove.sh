#!/usr/bin/env bash
# Proof of docker/ without a registry, a GPU or an installed Docker: on Debian 12, as root, with a Python 3.11
# environment that holds requirements.lock. A Docker Engine of Debian 13 runs in a network namespace of its own, on
# stand-ins for the base images. Ends with 0, or at the first statement that does not hold.
#   PYTHON=.venv/bin/python tests/docker/prove.sh [STEP…]     steps, in order: see STEPS; default: all
# The step static needs the tools of the extra deploy on the PATH, as `make docker-test` puts them there.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=$(realpath -s "${PYTHON:?the python of the locked environment}")
W=${W:-/var/tmp/sglang-misa-docker} # what is kept between runs: packages, base, images
# PROMETHEUS: the binary to scrape with, where another than Debian 12's is to be tried.
START=${START:-900} # seconds that a server on the CPU may take to start; 60 on an idle machine
VERSION=$("$PYTHON" -c "import sglang_misa; print(sglang_misa.__version__)")
STEPS=(engine static base build images serve keys monitoring load recovery stop refusals demo)

say() { printf '[%4d s] %s\n' "$SECONDS" "$*"; }
fail() { say "FAILED: $*"; exit 1; }
refuses() { # WORDS LOG COMMAND…: the command fails, and its output has the words
  local words=$1 log=$2; shift 2
  if "$@" > "$log" 2>&1; then fail "expected a refusal: $*"; fi
  grep -q -- "$words" "$log" || { tail -n 5 "$log"; fail "expected '$words' from: $*"; }
  say "refused: $words"
}
compose() { docker compose -f docker/compose.yaml -f tests/docker/cpu.yaml "$@"; }
container() { compose --profile '*' ps -aq "$1"; }
ask() { nsenter -t "$(cat "$W/engine.pid")" -n "$PYTHON" -B tests/docker/ask.py "$@"; }
logs() { # the log of a service, whole
  compose --profile '*' logs --no-color "$1" 2>&1
}
healthy() { # SERVICE SECONDS
  for _ in $(seq "$2"); do
    [ "$(docker inspect -f '{{.State.Health.Status}}' "$(container "$1")")" = healthy ] && return
    sleep 1
  done
  logs "$1" | tail -n 20
  fail "$1 is not healthy after $2 s"
}
image() { buildah --root "$W/store" --runroot "$W/runroot" --storage-driver overlay "$@"; }
build() { # TARGET WORDS…
  local target=$1 ca=/etc/ssl/certs/ca-certificates.crt; shift
  image build --isolation chroot -v $ca:$ca:ro --build-arg PYTHON_IMAGE=localhost/python --target "$target" "$@" \
    -f docker/Dockerfile .
}

engine() { # Debian 13's Engine and Compose, unpacked beside this system
  local words=(-o Dir::Etc::sourcelist="$W/trixie.list" -o Dir::Etc::sourceparts=/dev/null
    -o Dir::State::lists="$W/lists" -o Dir::Cache="$W/cache" -o APT::Sandbox::User=root)
  apt-get install -y -qq --no-install-recommends buildah runc tini iptables iproute2 mmdebstrap prometheus > "$W/apt.log" 2>&1
  [ -x "$W/engine/usr/sbin/dockerd" ] && return
  mkdir -p "$W"/{lists/partial,cache/archives/partial,debs}
  local mirror
  # shellcheck disable=SC2016 # apt expands it
  mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep -v security | head -n 1) # what this machine uses
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" > "$W/trixie.list"
  apt-get "${words[@]}" update -qq
  (cd "$W/debs" && apt-get "${words[@]}" download -qq docker.io containerd docker-cli docker-compose)
  for deb in "$W"/debs/*.deb; do dpkg -x "$deb" "$W/engine"; done
}

static() { # tests/docker with every tool that it can use, so that nothing is skipped
  "$PYTHON" -m pytest -v -rs -p no:cacheprovider tests/docker > "$W/static.log" || { tail -n 40 "$W/static.log"; fail "tests/docker"; }
  ! grep -q SKIPPED "$W/static.log" || fail "tests/docker skipped something"
  say "$(tail -n 1 "$W/static.log")"
}

standin() { # NAME, of the Dockerfile on stdin
  image build -q --isolation chroot -t "$1" -f - "$W/base" > /dev/null
}

base() { # stand-ins: python (the slim image), sglang (SGLang's own, with the locked packages mounted), prometheus
  [ -f "$W/base/base.tar" ] || mmdebstrap --quiet --variant=minbase \
    --include=python3,python3-pip,ca-certificates,curl bookworm "$W/base/base.tar"
  cp "${PROMETHEUS:-/usr/bin/prometheus}" "$W/base/prometheus"
  printf 'FROM scratch\nADD base.tar /\nRUN mkdir /opt/site\n' | standin python
  printf 'FROM localhost/python\nENV PYTHONPATH=/opt/site\n' | standin sglang-runtime
  printf 'FROM localhost/sglang-runtime\nRUN ln -s /bin/true /usr/local/bin/nvcc\n' | standin sglang
  printf 'Name: sglang\nVersion: 9.9.9\n' > "$W/base/METADATA"
  printf 'FROM localhost/python\nCOPY METADATA /usr/lib/python3/dist-packages/sglang-9.9.9.dist-info/\n' | standin sglang-unknown
  printf 'FROM localhost/python\nCOPY prometheus /bin/prometheus\nRUN mkdir /prometheus && chown 65534 /prometheus\nUSER 65534\nENTRYPOINT ["/bin/prometheus"]\n' \
    | standin standin-prometheus
}

build_all() { # docker/Dockerfile; a wrong base fails the build, not the start
  local site=(-v "$SITE:/opt/site:ro") found pinned
  mkdir -p "$W/empty"
  for found in "$SITE"/sglang_misa-*.dist-info; do # pip would uninstall it
    [ -d "$found" ] && site+=(-v "$W/empty:/opt/site/$(basename "$found"):ro")
  done
  refuses "No package metadata was found for sglang" "$W/wrong.log" build server --build-arg SGLANG_IMAGE=localhost/python
  refuses "SGLang: expected one of .* got 9.9.9" "$W/wrong.log" build server --build-arg SGLANG_IMAGE=localhost/sglang-unknown
  refuses "expected nvcc, got none" "$W/wrong.log" build server "${site[@]}" --build-arg SGLANG_IMAGE=localhost/sglang-runtime
  pinned=localhost/sglang@$(image inspect --type image --format '{{.FromImageDigest}}' sglang)
  build server "${site[@]}" --build-arg SGLANG_IMAGE="$pinned" -t "sglang-misa:$VERSION" > "$W/build.log" 2>&1
  say "built on ${pinned/sha256:*/sha256:…}"
  build demo --build-context packages=container-image://localhost/python -t "sglang-misa-demo:$VERSION" > "$W/build-demo.log" 2>&1
  build load -t "sglang-misa-load:$VERSION" > "$W/build-load.log" 2>&1
}

images() { # from buildah's store into the engine's
  for name in "sglang-misa:$VERSION" "sglang-misa-demo:$VERSION" "sglang-misa-load:$VERSION" standin-prometheus:latest; do
    rm -f "$W/image.tar"
    image push -q "localhost/$name" "docker-archive:$W/image.tar:$name"
    docker load -q -i "$W/image.tar" > /dev/null
  done
  rm -f "$W/image.tar"
}

start_engine() {
  unshare -n -m bash -c 'ip link set lo up; exec dockerd "$@"' dockerd --data-root "$W/data" --exec-root "$W/exec" \
    --pidfile "$W/engine.pid" -H "$DOCKER_HOST" --init-path /usr/bin/tini --storage-driver overlay2 \
    --exec-opt native.cgroupdriver=cgroupfs --default-ulimit nofile=16384:16384 > "$W/dockerd.log" 2>&1 &
  local started=$!
  trap 'compose --profile "*" down -v -t 5 > /dev/null 2>&1 || true; kill '$started'; wait '$started' || true' EXIT
  for _ in $(seq 60); do docker info > /dev/null 2>&1 && return; sleep 1; done
  tail "$W/dockerd.log"
  fail "no engine after 60 s"
}

secrets() { # two keys as docs/operations.md says: mode 0640, of a group that the containers join
  export SECRETS_GID=4711 API_KEY_FILE=$W/secrets/api_key ADMIN_API_KEY_FILE=$W/secrets/admin_api_key
  install -d -m 750 -g $SECRETS_GID "$W/secrets"
  for name in api_key admin_api_key grafana_password; do
    (umask 027; "$PYTHON" -c 'import secrets; print(secrets.token_hex(24))' > "$W/secrets/$name")
    chgrp $SECRETS_GID "$W/secrets/$name"
  done
}

serve() {
  compose --profile serve up -d --no-build --wait --wait-timeout "$START" 2> "$W/up.log" || { tail -n 3 "$W/up.log"; logs server | tail -n 30; fail "server is not up"; }
  local name confined
  name=$(container server)
  confined=$(docker exec "$name" sh -c 'id -u; touch /new 2>&1; grep -E "^(CapEff|NoNewPrivs)" /proc/1/status' | tr -s '\n\t' ' ')
  [ "$confined" = "10001 touch: cannot touch '/new': Read-only file system CapEff: 0000000000000000 NoNewPrivs: 1 " ] || fail "$confined"
  docker exec "$name" sh -c 'cat /usr/local/lib/python3*/dist-packages/sglang_misa/bench/results/kernels.csv' > /dev/null || fail "the image has no costs to calibrate by"
  say "healthy: uid 10001, read-only root, no capabilities, no new privileges, keys by group"
}

not_told() { # no key in a log, a volume, a command line or an environment
  local found=("$W/data/containers" "$W/data/volumes" "$W"/*.log)
  if grep -rlF -e "$(cat "$API_KEY_FILE")" -e "$(cat "$ADMIN_API_KEY_FILE")" "${found[@]}"; then fail "a key is in a file"; fi
  if docker exec "$1" sh -c 'cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2> /dev/null; true' | grep -aF -e "$(cat "$API_KEY_FILE")" -e "$(cat "$ADMIN_API_KEY_FILE")" > /dev/null; then fail "a process shows a key"; fi
}

keys() {
  ask keys
  not_told "$(container server)"
  logs server | grep "admin_api_key[^,]*\*\*\*" > /dev/null || fail "the arguments are not in the log: nothing was proven"
  say "no key in any answer, log, volume, command line or environment"
}

monitoring() {
  compose --profile monitoring up -d --no-build --wait prometheus 2>> "$W/up.log"
  ask scraped
  ask load
  ask queries
}

load() {
  LOAD_INPUT_LEN=512 LOAD_OUTPUT_LEN=4 LOAD_CONCURRENCY=2 LOAD_REQUESTS=4 compose --profile load run --rm --no-deps load > "$W/load.log" 2>&1 \
    || [ $? = 3 ] || { tail -n 20 "$W/load.log"; fail "the load test"; } # 3: figures invalid, as on a busy machine
  docker run --rm --entrypoint ls -v sglang-misa_reports:/reports "sglang-misa-load:$VERSION" -R /reports | grep report.html > /dev/null || fail "no report in the volume"
  not_told "$(container server)"
  say "the load test reported, without a key"
}

recovery() {
  local name victim
  name=$(container server)
  victim=$(docker exec "$name" sh -c 'grep -l "[s]glang::scheduler" /proc/[0-9]*/cmdline | cut -d/ -f3 | head -n 1')
  docker exec "$name" sh -c "kill -9 ${victim:?no scheduler}"
  for _ in $(seq 60); do [ "$(docker inspect -f '{{.RestartCount}}' "$name")" = 1 ] && break; sleep 1; done
  [ "$(docker inspect -f '{{.RestartCount}}' "$name")" = 1 ] || fail "not restarted"
  healthy server "$START"
  say "killed -9 its scheduler: restarted, healthy"
}

stop() {
  local name status
  name=$(container server)
  compose --profile serve stop server 2>> "$W/up.log"
  status=$(docker inspect -f '{{.State.ExitCode}}' "$name")
  [ "$status" = 0 ] || { logs server | tail -n 20; fail "stop ended with $status"; }
  say "a stop ends with 0"
}

launch_refused() { # MESSAGE FLAGS… -- WORDS…: the launcher as in compose.yaml, with other mounts
  local message=$1 flags=(); shift
  while [ "$1" != -- ]; do flags+=("$1"); shift; done
  refuses "$message" "$W/refusal.log" docker run --rm --read-only --tmpfs /tmp --cap-drop ALL -v "$SITE:/opt/site:ro" \
    -e PYTHONPATH=/opt/site "${flags[@]}" "sglang-misa:$VERSION" --misa-preset=faithful "${@:2}"
}

refusals() { # each by its message, with nothing half-started
  local model=(-v "$MODEL:/model:ro")
  chmod 600 "$API_KEY_FILE"
  refuses "api-key-file: expected a file that uid 10001 can read.*mode 0640.* $SECRETS_GID" "$W/refusal.log" compose --profile serve run --rm --no-deps -T server
  chmod 640 "$API_KEY_FILE"
  launch_refused "host: expected a key, or a loopback address, got 0.0.0.0" "${model[@]}" -- --model-path=/model --host=0.0.0.0
  install -d -m 700 "$W/private"
  cp "$MODEL/config.json" "$W/private"
  launch_refused "model-path: expected files that uid 10001 can read, got /model" -v "$W/private:/model:ro" -- --model-path=/model
  launch_refused "TRITON_CACHE_DIR: expected 1024 MiB free" "${model[@]}" --tmpfs /cache:size=1m,mode=700,uid=10001 -- --model-path=/model
  install -d -m 777 "$W/open"
  launch_refused "TRITON_CACHE_DIR: expected a folder that others cannot write" "${model[@]}" -v "$W/open:/cache/triton" -- --model-path=/model
  [ -z "$(ls -A "$W/open")" ] || fail "something was written to the open cache"
  compose --profile serve down 2>> "$W/up.log" # so that the next ones have a container to make
  DOCKER_API_VERSION=1.43 refuses "start interval.* requires API version 1.44" "$W/refusal.log" compose --profile serve up -d --no-build
  MODEL=./nowhere refuses "bind source path does not exist: .*/docker/nowhere" "$W/refusal.log" compose --profile serve up -d --no-build
  [ ! -e docker/nowhere ] || fail "the folder of the model was created"
  (unset MODEL; refuses "MODEL-is-not-set" "$W/refusal.log" compose --profile serve up -d --no-build)
  (unset MODEL; compose --profile monitoring config -q; compose logs > /dev/null; compose down 2>> "$W/up.log")
  say "monitoring, logs and down need no MODEL"
}

demo() {
  compose --profile demo up -d --no-build --wait --wait-timeout "$START" 2>> "$W/up.log" || { logs demo | tail -n 30; fail "demo is not up"; }
  ask keys
  not_told "$(container demo)"
  compose --profile demo stop demo 2>> "$W/up.log"
  say "the demo is reached from outside, with a key"
}

main() {
  [ "$(id -u)" = 0 ] || fail "expected root, got uid $(id -u)"
  "$PYTHON" -c 'import sys; sys.version_info[:2] == (3, 11) or sys.exit("expected Python 3.11, as in Debian 12")'
  SITE=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  export SITE
  mkdir -p "$W"/{base,config/cli-plugins}
  echo '{}' > "$W/config/config.json"
  ln -sf "$W/engine/usr/libexec/docker/cli-plugins/docker-compose" "$W/config/cli-plugins/"
  export PATH="$W/engine/usr/sbin:$W/engine/usr/bin:$PATH" DOCKER_CONFIG=$W/config DOCKER_HOST=unix://$W/engine.sock
  secrets
  MODEL=$("$PYTHON" -B -c "from pathlib import Path; from sglang_misa import random_model as m; print(m.ensure(Path('$W'), m.CPU))")
  export MODEL
  chmod -R a+rX "$MODEL"

  for step in "${@:-${STEPS[@]}}"; do
    say "$step"
    case $step in
      engine) engine ;;
      base) base ;;
      build) build_all ;;
      *) [ -n "$(docker info -f '{{.ID}}' 2> /dev/null)" ] || start_engine; "$step" ;;
    esac
  done
  say "proven: ${*:-everything}"
}

main "$@"
