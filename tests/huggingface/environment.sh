#!/usr/bin/env bash
# Makes build/huggingface/python: an interpreter with torch (CPU) and transformers for the tests of
# the Hugging Face adapter. Does nothing when all is there.
#
# torch for CPUs alone comes from Debian 13, 200 MB, whatever Debian this is; the packages of PyPI
# would be GPU builds of 3 GB. Debian's files are unpacked under build/huggingface and run with
# their own loader: nothing is installed on the system, and root is not needed. transformers comes
# from PyPI, pinned.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

suite=trixie
python=python3.13
debian_packages=(python3-torch libopenblas0-pthread)
# Named by dependencies, and never loaded: GPUs, tests, documents.
unneeded='^(libllvm17t64|libamd-comgr2|libamdhip64-5|libhsa-runtime64-1|libtorch-test)_'
requirements=tests/huggingface/requirements.txt

folder=$PWD/build/huggingface
stamp=$(cat "$0" "$requirements" | sha256sum | cut -c1-16)
if [[ -f $folder/installed-$stamp ]]; then
  exit 0
fi
echo "huggingface: making an environment in build/huggingface"
rm -rf "$folder"
mkdir -p "$folder"/apt/{lists/partial,archives/partial,etc/preferences.d} "$folder/system"
touch "$folder/apt/status"

# The mirror that this system uses.
mirror=$(apt-get indextargets --format '$(SITE) $(ORIGIN) $(COMPONENT)' 'Created-By: Packages' |
  awk '$2 == "Debian" && $3 == "main" && $1 !~ /security/ { print $1; exit }')
if [[ -z $mirror ]]; then
  echo "huggingface: this system knows no mirror of Debian" >&2
  exit 1
fi
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$keyring] $mirror $suite main" >"$folder/apt/etc/sources.list"
apt=(apt-get -qq
  -o "Dir::Etc=$folder/apt/etc" -o "Dir::State::lists=$folder/apt/lists"
  -o "Dir::State::status=$folder/apt/status" -o "Dir::Cache=$folder/apt"
  -o "Dir::Etc::sourcelist=$folder/apt/etc/sources.list" -o Dir::Etc::sourceparts=-
  -o APT::Install-Recommends=false -o APT::Sandbox::User= -o Debug::NoLocking=true
  -o Acquire::Languages=none)
"${apt[@]}" update
"${apt[@]}" install --yes --download-only "${debian_packages[@]}"
for package in "$folder"/apt/archives/*.deb; do
  if [[ ! $(basename "$package") =~ $unneeded ]]; then
    dpkg-deb --fsys-tarfile "$package" |
      tar -x -C "$folder/system" --exclude='./usr/share/*' --exclude='./etc/*' --exclude='./var/*'
  fi
done
rm -rf "$folder/apt"

build/venv/bin/pip --quiet --disable-pip-version-check install --target "$folder/packages" \
  --python-version "${python#python}" --implementation cp --abi "cp${python//[^0-9]/}" --abi abi3 \
  --abi none --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
  --only-binary=:all: --no-deps -r "$requirements"

cat >"$folder/python" <<END
#!/bin/sh
# Debian's own loader with Debian's own libraries, then the packages of PyPI.
usr=$folder/system/usr
lib=\$usr/lib/x86_64-linux-gnu
export PYTHONHOME=\$usr PYTHONPATH="$folder/packages:\$PYTHONPATH" PYTHONDONTWRITEBYTECODE=1
exec \$usr/lib64/ld-linux-x86-64.so.2 --library-path \$lib/openblas-pthread:\$lib:\$usr/lib \\
  --argv0 \$usr/bin/$python \$usr/bin/$python "\$@"
END
chmod +x "$folder/python"
"$folder/python" -c 'import torch, transformers'
touch "$folder/installed-$stamp"
