# For x86-64, behind common.awk.
function begin() {
    frame = 0
    split("", tweak)
}
# A general register has a tweak from the carry of a doubling on, and so has what is copied of it
# or made with it, until something else is written there.
{
    to = $NF; sub(/.*,/, "", to)
    # The lower half of a register is written as one of its own name, and clears the upper.
    if (to ~ /^%e/) sub(/%e/, "%r", to)
    if (to ~ /^%r[0-9]+d$/) sub(/d$/, "", to)
    if (to ~ /^%r/) {
        from = ""
        for (reg in tweak) if (tweak[reg] && index($NF, reg ",") == 1) from = reg
        if ($2 == "adc") tweak[to] = 1
        else if ($2 ~ /^(add|xor|or|shl|shr|shld|shrd)$/) { if (from != "") tweak[to] = 1 }
        else if ($2 !~ /^(cmp|test|push)/) tweak[to] = ($2 == "mov" && from != "")
    } else if ($2 == "mov" && to ~ /\(%rsp\)$/) {
        for (reg in tweak) if (tweak[reg] && index($NF, reg ",") == 1) {
            print file ": " name " puts a tweak on the stack:"; print "  " $0; bad = 1
        }
    }
}
# In AT&T syntax the destination comes last. %rbp is the stack only where it is the frame pointer.
/mov +%rsp,%rbp/ { frame = 1 }
/vaes(enc|dec)/ { aes[short]++ }
/%[xyz]mm[0-9]+.*,[^,]*\(%rsp[^)]*\)$/ || (frame && /%[xyz]mm[0-9]+.*,[^,]*\(%rbp[^)]*\)$/) {
    print file ": " name " spills a vector register:"; print "  " $0; bad = 1
}
