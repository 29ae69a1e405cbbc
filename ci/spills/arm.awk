# As x86.awk, for 64-bit ARM. Tweaks are in vector registers alone there, and never in general ones.
/^[0-9a-f]+ </ {
    name = $0
    sub(/^[0-9a-f]+ </, "", name); sub(/>:$/, "", name)
    short = substr(name, length(module) + 1); sub(/::h[0-9a-f]+$/, "", short)
    if (!index(kernels, " " short " ")) {
        print file ": " name " was not inlined into its kernel"; bad = 1
    }
    begun = 0
    aes[short] = 0
    next
}
{ operands = $0; sub(/^[^\t]*\t[^\t]*\t?/, "", operands); sub(/[ \t]*\/\/.*/, "", operands) }
$2 ~ /^aes[ed]$/ { aes[short]++ }
# What a kernel begins with is to save the lower halves of v8 to v15, which are its caller's.
$2 ~ /^st/ && operands ~ /^\{?[qdshbvz][0-9]/ {
    callers = !begun && operands ~ /^d([89]|1[0-5])(, d([89]|1[0-5]))?, \[sp/
    if (operands ~ /\[(sp|x29)/ && !callers) {
        print file ": " name " spills a vector register:"; print "  " $0; bad = 1
    }
    next
}
operands ~ /(^|[ {])[qdshbvz][0-9]+/ { begun = 1 }
$2 ~ /^[us]mov$/ || ($2 ~ /^f?mov$/ && operands ~ /^[xw][0-9]+, [dshv][0-9]/) {
    print file ": " name " moves a vector register to a general one:"; print "  " $0; bad = 1
}
# A kernel has nothing in memory of its own: an address on the stack in another register is to store there.
operands ~ /^x[0-9]+, sp/ && operands !~ /^x29,/ {
    print file ": " name " takes the address of its stack:"; print "  " $0; bad = 1
}
END {
    for (kernel in aes) if (aes[kernel] < least) {
        print file ": " kernel " has only " aes[kernel] " AES instructions; the code is not what this script knows"
        bad = 1
    }
    exit bad
}
