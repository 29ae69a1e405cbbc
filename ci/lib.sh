# Shared by the scripts in ci/: where things lie, how to speak, and how to get software from Debian
# without touching the machine: packages with everything they need are unpacked into a folder (a "tree")
# and run from there, so that neither root nor a particular state of the machine's packages is needed.
# shellcheck shell=bash

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${SEALBLK_CACHE:-$repo/target/ci}
tree=$cache/debian           # QEMU and what the guest is made of
backports=$cache/backports   # the newer QEMU of Debian's backports suite
codename=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")

bold='' red='' green='' plain=''
if [ -t 1 ]; then
    bold=$'\e[1m' red=$'\e[31m' green=$'\e[32m' plain=$'\e[0m'
fi

say() { printf '%s\n' "$*"; }
section() { printf '\n%s== %s%s\n' "$bold" "$*" "$plain"; }
die() {
    printf '%s%s: %s%s\n' "$red" "${0##*/}" "$*" "$plain" >&2
    exit 1
}

# Prints a command as a user would type it, then runs it.
run() {
    printf '%s$ %s%s\n' "$green" "$(words "$@")" "$plain"
    "$@"
}

# step TITLE COMMAND…: runs a command under a title and says how long it took; ends everything when it fails.
step() {
    local before=$SECONDS
    section "$1"
    shift
    run "$@" || die "failed after $((SECONDS - before)) s: $(words "$@")"
    say "($((SECONDS - before)) s)"
}

# The words of a command, quoted only where a shell needs it.
words() {
    local word line=''
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
        line+="${line:+ }$word"
    done
    printf '%s' "$line"
}

# as_root COMMAND…: runs it as root, or says that it cannot.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "root is needed for: $(words "$@")"
    fi
}

# ---- Debian packages ------------------------------------------------------------------------------

# private_apt FOLDER SUITE [ARCHITECTURE]: lets apt know Debian's release and SUITE (preferred) from
# the places where this machine's own Debian sources point, and believe that nothing is installed.
# Its state goes into FOLDER.
private_apt() {
    local dir=$1 prefer=$2 architecture=${3:-} suite keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    mkdir -p "$dir/state/lists/partial" "$dir/cache/archives/partial"
    : >"$dir/status"
    apt-get indextargets --format '$(RELEASE) $(REPO_URI) $(COMPONENT)' 'Created-By: Packages' |
        sort -u >"$dir/known"
    for suite in "$codename" "$codename-updates" "$codename-security" "$codename-backports"; do
        # Backports lie beside the main suite, also where the machine does not use them.
        case $suite in
            *-backports) [ "$suite" = "$prefer" ] || continue ;;
        esac
        awk -v suite="$suite" -v like="${suite%-backports}" -v key="$keyring" \
            '$1 == like && $3 == "main" { print "deb [signed-by=" key "] " $2 " " suite " main" }' "$dir/known"
    done >"$dir/sources.list"
    grep -q " $prefer main$" "$dir/sources.list" ||
        die "apt has no source for Debian \"$codename\"; this needs a Debian machine (12 is what is tested)"
    cat >"$dir/apt.conf" <<CONF
Dir::State "$dir/state";
Dir::State::status "$dir/status";
Dir::Cache "$dir/cache";
Dir::Etc::sourcelist "$dir/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Sandbox::User "";
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::Retries "3";
Debug::NoLocking "true";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
CONF
    # Naming the plain release here would also prefer it to its own security updates.
    [ "$prefer" = "$codename" ] || echo "APT::Default-Release \"$prefer\";" >>"$dir/apt.conf"
    [ -z "$architecture" ] ||
        printf '%s\n' '#clear APT::Architectures;' "APT::Architecture \"$architecture\";" \
            "APT::Architectures { \"$architecture\"; };" >>"$dir/apt.conf"
}

# debian_tree FOLDER SUITE PACKAGE…: unpacks the packages, with all that they depend on, into FOLDER.
# Does nothing when FOLDER holds them already. They are for this machine's architecture, or for
# TREE_ARCHITECTURE.
debian_tree() {
    local folder=$1 suite=$2 apt=$cache/apt/${1##*/} deb
    shift 2
    if [ "$(cat "$folder/.packages" 2>/dev/null)" = "$suite: $*" ]; then
        return
    fi
    command -v apt-get >/dev/null || die "no apt-get; this needs a Debian machine (12 is what is tested)"
    say "downloading from Debian ($suite) and unpacking into $folder:"
    say "  $*"
    private_apt "$apt" "$suite" "${TREE_ARCHITECTURE:-}"
    # Old package lists name files that are gone, so a second try begins by fetching them anew.
    if ! download "$apt" "$@" >"$apt/log" 2>&1; then
        { apt-get -c "$apt/apt.conf" update && download "$apt" "$@"; } >"$apt/log" 2>&1 ||
            die "apt could not download the packages:"$'\n'"$(tail -n 20 "$apt/log")"
    fi
    rm -rf "$folder" "$folder.new"
    mkdir -p "$folder.new"
    for deb in "$apt"/cache/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$folder.new" --no-same-owner --keep-directory-symlink
    done
    printf '%s\n' "$suite: $*" >"$folder.new/.packages"
    mv "$folder.new" "$folder"
    rm -rf "$apt/cache/archives"
}

download() {
    local apt=$1
    shift
    apt-get -c "$apt/apt.conf" -qq -y --download-only install "$@"
}

# library_path FOLDER: where the programs of a tree find their libraries.
library_path() {
    local lib=x86_64-linux-gnu
    printf '%s' "$1/usr/lib/$lib:$1/lib/$lib:$1/usr/lib/$lib/ceph"
}

# tree_exec FOLDER PROGRAM ARGUMENT…: becomes the program of a tree, with that tree's own libraries.
tree_exec() {
    local folder=$1 name=$2 file
    shift 2
    for file in "$folder"/{usr/,}{bin,sbin}/"$name"; do
        # A package's absolute links mean the tree, not this machine.
        [[ -L $file && $(readlink "$file") == /* ]] && file=$folder$(readlink "$file")
        if [ -x "$file" ]; then
            export QEMU_MODULE_DIR=$folder/usr/lib/x86_64-linux-gnu/qemu
            exec "$folder/lib64/ld-linux-x86-64.so.2" --argv0 "$name" \
                --library-path "$(library_path "$folder")" "$file" "$@"
        fi
    done
    die "there is no $name in $folder; run ./ci/setup first"
}

# in_tree PROGRAM ARGUMENT…: runs a program of the tree.
in_tree() { (tree_exec "$tree" "$@"); }
