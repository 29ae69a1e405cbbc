# Boots the test guest on a volume, and has it run commands. Comes after ci/lib.sh.
# shellcheck shell=bash

talk='' qemu_pid='' reply='' output=''

# talk_in FOLDER: where the guest's console and pipes are. Relative: QEMU takes no comma in a path.
talk_in() { talk=$1; }

# boot SOCKET: boots the guest on the volume that is served at this socket. Its /init takes commands from the
# two pipes.
boot() {
    rm -f "$talk"/agent.{in,out}
    mkfifo "$talk"/agent.{in,out}
    exec 4<>"$talk/agent.in" 5<>"$talk/agent.out"
    run_qemu ./ci/guest/qemu \
        -chardev "socket,id=disk,path=$1,reconnect=1" \
        -device vhost-user-blk-pci,chardev=disk,num-queues=2 \
        -serial "file:$talk/console.log" -device virtio-serial-pci \
        -chardev "pipe,id=agent,path=$talk/agent" -device virtserialport,chardev=agent,name=sealblk.agent
    answer
    [ "$reply" = ready ] || die "the guest did not boot: $reply"
}

run_qemu() {
    printf '%s$ %s &%s\n' "$green" "$(words "$@")" "$plain"
    "$@" 4<&- 5<&- &
    qemu_pid=$!
}

# Waits for the guest's next line, at most twenty minutes: an emulated guest on a busy machine is slow.
answer() {
    local tries=0 part
    reply=''
    # A read that runs out of time answers what has come of the line.
    until IFS= read -r -t 1 -u 5 part; do
        reply+=$part
        kill -0 "$qemu_pid" 2>/dev/null || die "QEMU has ended; the guest's console is in $talk/console.log"
        [ $((tries += 1)) -lt 1200 ] || die "the guest does not answer; its console is in $talk/console.log"
    done
    reply+=$part
}

# Runs a command in the guest and shows what it says.
guest() {
    local id status length
    printf '%sguest#%s %s\n' "$bold" "$plain" "$1"
    echo "0 $(printf 'set -e\n%s' "$1" | base64 -w0)" >&4
    answer
    read -r _ id status length <<<"$reply"
    output=$(head -c "$length" <&5)
    [ -z "$output" ] || printf '%s\n' "$output"
    [ "$id $status" = "0 0" ] || die "that failed in the guest, with $status"
}

poweroff() {
    printf '%sguest#%s poweroff -f\n' "$bold" "$plain"
    echo "0 $(printf 'poweroff -f' | base64 -w0)" >&4
    wait "$qemu_pid" || die "QEMU ended with $?"
    qemu_pid=''
    exec 4<&- 5<&-
}
