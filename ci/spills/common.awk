# What the rules of every architecture have in common: reads the disassembly of a module of kernels; prints
# what ci/check-spills forbids, and fails if there is any. The file of an architecture comes behind this one,
# and has `begin`, which forgets what it knew of the kernel before.
/^[0-9a-f]+ </ {
    name = $0
    sub(/^[0-9a-f]+ </, "", name); sub(/>:$/, "", name)
    short = substr(name, length(module) + 1); sub(/::h[0-9a-f]+$/, "", short)
    if (!index(kernels, " " short " ")) {
        print file ": " name " was not inlined into its kernel"; bad = 1
    }
    begin()
    aes[short] = 0
    next
}
END {
    for (kernel in aes) if (aes[kernel] < least) {
        print file ": " kernel " has only " aes[kernel] " AES instructions; the code is not what this script knows"
        bad = 1
    }
    exit bad
}
