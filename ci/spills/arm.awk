# For 64-bit ARM, behind common.awk. Tweaks are in vector registers alone there, and never in general ones.
function begin() {
    begun = 0
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
