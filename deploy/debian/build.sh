#!/usr/bin/env bash
# Makes build/deb/kvservice_VERSION_ARCH.deb of the programs in build/bin. Dependencies are those
# that dpkg-shlibdeps finds in them, manual pages are what the programs say about themselves.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

bin=build/bin
out=build/deb
tree=$out/tree
version=$("$bin/kvctl" -o json version | sed -n 's/.*"version": "\(.*\)".*/\1/p')
architecture=$(dpkg --print-architecture)
rm -rf "$out"
mkdir -p "$tree/DEBIAN"

install_programs() {
  install -D -t "$tree/usr/bin" "$bin/kvservice" "$bin/kvctl"
  strip "$tree"/usr/bin/*
  install -D -m 644 deploy/systemd/kvservice.service "$tree/lib/systemd/system/kvservice.service"
  install -D -m 644 deploy/debian/kvservice.conf "$tree/etc/kvservice/kvservice.conf"
  mkdir -p "$tree/usr/share/bash-completion/completions"
  "$bin/kvctl" completion bash >"$tree/usr/share/bash-completion/completions/kvctl"
}

# help2man PROGRAM SECTION HELP-FLAG; the default endpoint of the page is not that of who builds it.
page() {
  XDG_RUNTIME_DIR=/run/user/UID help2man --no-info --version-string="$version" --section="$2" \
    --help-option="$3" --include="deploy/man/$1.h2m" "$bin/$1" >"$tree/usr/share/man/man$2/$1.$2"
}

install_documents() {
  local doc=$tree/usr/share/doc/kvservice
  mkdir -p "$tree"/usr/share/man/man{1,5,8} "$doc/examples"
  page kvservice 8 --help
  page kvctl 1 --help-all
  cp deploy/man/kvservice.conf.5 "$tree/usr/share/man/man5/"
  gzip -9 -n "$tree"/usr/share/man/man*/*
  cp deploy/prometheus/kvservice.rules.yml deploy/grafana/kvservice.dashboard.json "$doc/examples/"
  cp docs/operations.md docs/kvctl.md "$doc/"
  gzip -9 -n -c CHANGELOG.md >"$doc/changelog.gz"
  {
    echo "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/"
    echo "Files: *"
    echo "Copyright: The KVService authors"
    echo "License: Apache-2.0"
    echo " /usr/share/common-licenses/Apache-2.0"
  } >"$doc/copyright"
  chmod -R u=rwX,go=rX "$tree"
}

# dpkg-shlibdeps wants to be in a source package.
dependencies() {
  local work
  work=$(mktemp -d)
  mkdir "$work/debian"
  printf 'Source: kvservice\n\nPackage: kvservice\nArchitecture: any\n' >"$work/debian/control"
  local programs=("$PWD/$tree/usr/bin/kvservice" "$PWD/$tree/usr/bin/kvctl")
  (cd "$work" && dpkg-shlibdeps -O "${programs[@]}") | sed -n 's/^shlibs:Depends=//p'
  rm -r "$work"
}

fill_in_control() {
  local size depends
  size=$(du -sk --exclude=DEBIAN "$tree" | cut -f1)
  depends=$(dependencies)
  sed -e "s/@VERSION@/$version/; s/@ARCHITECTURE@/$architecture/; s/@SIZE@/$size/" \
    -e "s/@DEPENDS@/$depends/" deploy/debian/control.in >"$tree/DEBIAN/control"
  echo /etc/kvservice/kvservice.conf >"$tree/DEBIAN/conffiles"
  install -m 755 deploy/debian/{postinst,prerm,postrm} "$tree/DEBIAN/"
}

install_programs
install_documents
fill_in_control
dpkg-deb --root-owner-group --build "$tree" "$out/kvservice_${version}_$architecture.deb"
