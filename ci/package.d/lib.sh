# Shared by the trials of the package: Debian systems in folders, which are made once and thrown away changed.
# shellcheck shell=bash

[ "$(id -u)" = 0 ] || die "this needs root: debootstrap, mounts and containers"

# need PROGRAM=PACKAGE…: installs the packages of programs that are missing.
need() {
    local pair missing=()
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing: apt-get install ${missing[*]}"
    apt-get -qq update >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install "${missing[@]}" >/dev/null
}

# base_system NAME PACKAGE…: a Debian with these packages beside the smallest set, in $cache/systems/NAME.
base_system() {
    local folder=$cache/systems/$1
    shift
    if [ "$(cat "$folder.has" 2>/dev/null)" = "$codename: $*" ]; then
        return
    fi
    [ -e "$cache/systems/smallest.has" ] || smallest_system
    say "a Debian in $folder with $*"
    remove_system "$folder"
    cp -a "$cache/systems/smallest" "$folder"
    # The name servers and apt's sources of this machine; services are not started there.
    cp /etc/resolv.conf "$folder/etc/resolv.conf"
    printf '#!/bin/sh\nexit 101\n' >"$folder/usr/sbin/policy-rc.d"
    chmod 755 "$folder/usr/sbin/policy-rc.d"
    if ! env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive chroot "$folder" \
        sh -c 'apt-get -q update && apt-get -q -y --no-install-recommends install "$@" && apt-get clean' sh "$@" \
        >"$folder.log" 2>&1; then
        die "apt could not install them:"$'\n'"$(tail -n 20 "$folder.log")"
    fi
    rm "$folder/usr/sbin/policy-rc.d"
    printf '%s' "$codename: $*" >"$folder.has"
}

smallest_system() {
    local folder=$cache/systems/smallest mirror
    need debootstrap=debootstrap
    mirror=$(apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' |
        awk -v suite="$codename" '$1 == suite { print $2; exit }')
    [ -n "$mirror" ] || die "apt has no source for Debian \"$codename\""
    say "the smallest Debian in $folder, of $mirror"
    remove_system "$folder"
    mkdir -p "$folder"
    debootstrap --variant=minbase "$codename" "$folder" "$mirror" >"$folder.log" 2>&1 ||
        die "debootstrap failed:"$'\n'"$(tail -n 20 "$folder.log")"
    rm -f "$folder"/var/cache/apt/archives/*.deb
    touch "$folder.has"
}

# Removes what another run has left half made.
remove_system() {
    rm -f "$1.has"
    for place in proc sys; do
        ! mountpoint -q "$1/$place" || umount "$1/$place"
    done
    rm -rf --one-file-system "$1"
}

# system_of NAME: mounts a copy of it, for this script alone, at $system; it is gone when the script ends.
system_of() {
    scratch=$(mktemp -d /tmp/sealblk-system.XXXXXX)
    system=$scratch/system
    mkdir -p "$system" "$scratch/changed"
    # Not in target: a file system that is one of layers itself, as in a container, cannot be the upper one.
    mount -t tmpfs -o size=4g tmpfs "$scratch/changed"
    mkdir "$scratch/changed/upper" "$scratch/changed/work"
    mount -t overlay overlay "$system" \
        -o "lowerdir=$cache/systems/$1,upperdir=$scratch/changed/upper,workdir=$scratch/changed/work"
    trap end_system EXIT
    trap 'exit 130' INT TERM
}

end_system() {
    local place
    for place in "$system/proc" "$system" "$scratch/changed"; do
        ! mountpoint -q "$place" || umount "$place"
    done
    rm -rf --one-file-system "$scratch"
}

# inside COMMAND…: runs a command in the system, with nothing of this machine's but /proc.
inside() {
    mountpoint -q "$system/proc" || mount -t proc proc "$system/proc"
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 HOME=/root TERM=dumb \
        chroot "$system" "$@"
}

# holds WHAT COMMAND…: says what is tried, and ends everything where it does not hold.
holds() {
    local what=$1 said
    shift
    said=$("$@" 2>&1) || die "$what: $(words "$@") says"$'\n'"$said"
    say "  $what"
}

# fails WHAT WORDS COMMAND…: a command has to fail and to say these words.
fails() {
    local what=$1 expected=$2 said
    shift 2
    ! said=$("$@" 2>&1) || die "$what: $(words "$@") succeeds:"$'\n'"$said"
    [[ $said == *"$expected"* ]] || die "$what: $(words "$@") does not say \"$expected\":"$'\n'"$said"
    say "  $what"
}

# ---- a system that runs ---------------------------------------------------------------------------

# boot_system: boots the system's own systemd in a container; "within" runs commands there.
boot_system() {
    local tries=0
    need systemd-nspawn=systemd-container
    console=$scratch/changed/console
    # It has no network but its own loopback. The calls are those that the program makes and nspawn does not
    # know of.
    SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 systemd-nspawn --quiet --keep-unit --register=no --link-journal=no \
        --directory="$system" --boot --private-network --console=pipe --machine="sealblk-$$" \
        --system-call-filter='@aio memfd_secret seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self' \
        >"$console" 2>&1 &
    nspawn=$!
    trap 'stop_system; end_system' EXIT
    until leader=$(init_of "$nspawn") && within systemctl is-system-running --wait >/dev/null 2>&1 ||
        [ "$(within systemctl is-system-running 2>/dev/null)" = degraded ]; do
        kill -0 "$nspawn" 2>/dev/null || die "the container has ended:"$'\n'"$(tail -n 30 "$console")"
        [ $((tries += 1)) -lt 600 ] || die "the container does not boot:"$'\n'"$(tail -n 30 "$console")"
        sleep 0.2
    done
}

# The first process of a container: the child of nspawn that is the first in a PID namespace of its own.
init_of() {
    local child
    for child in $(cat "/proc/$1/task/$1/children" 2>/dev/null); do
        grep -q '^NSpid:.*\s1$' "/proc/$child/status" 2>/dev/null && echo "$child" && return
    done
    return 1
}

within() {
    nsenter --target "$leader" --all --root --wd -- \
        env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 HOME=/root TERM=dumb "$@"
}

stop_system() {
    # A guest that is still there, outside of the container.
    if [ -n "${qemu_pid:-}" ] && [ "$qemu_pid" != "$nspawn" ] && kill "$qemu_pid" 2>/dev/null; then
        wait "$qemu_pid" || true
    fi
    kill -TERM "$nspawn" 2>/dev/null || return 0
    wait "$nspawn" || true
}

# comes WHAT COMMAND…: waits until a command succeeds, two minutes at most.
comes() {
    local what=$1 tries=0
    shift
    until "$@" >/dev/null 2>&1; do
        [ $((tries += 1)) -lt 600 ] || die "$what: it does not come to be: $(words "$@")"
        sleep 0.2
    done
    say "  $what"
}
