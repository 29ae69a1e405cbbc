/* A PKCS#11 module that is another one (DYING_MODULE), until its process ends at one of its calls. The file DYING_AT
 * says at which: "once N" is the call number N of all that all processes make, counted in that file, and "each N"
 * the call number N of every process. Built and loaded by tests/kms/hsm_ends.rs. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long ul;
typedef ul (*function)(ul, ul, ul, ul, ul, ul, ul, ul);

#define FUNCTIONS 68
struct list {
    unsigned char version[2];
    function call[FUNCTIONS];
};

static struct list *theirs, ours;

static void end(void) {
    kill(getpid(), SIGKILL);
    _exit(1);
}

static void count(void) {
    static long calls;
    char mode[8] = "", text[64];
    long at = -1;
    int file = open(getenv("DYING_AT"), O_RDWR | O_CLOEXEC);
    ssize_t len = file < 0 ? -1 : read(file, text, sizeof text - 1);
    if (len > 0) {
        text[len] = 0;
        sscanf(text, "%7s %ld", mode, &at);
    }
    if (!strcmp(mode, "once") && at >= 0) {
        len = snprintf(text, sizeof text, "once %ld\n", at - 1);
        if (ftruncate(file, 0) || pwrite(file, text, len, 0) != len)
            end();
        if (at == 0)
            end();
    }
    if (!strcmp(mode, "each") && calls++ == at) {
        len = snprintf(text, sizeof text, "each %ld reached\n", at);
        if (ftruncate(file, 0) || pwrite(file, text, len, 0) != len)
            end();
        end();
    }
    if (file >= 0)
        close(file);
}

#define CALL(n)                                                                                                       \
    static ul call_##n(ul a, ul b, ul c, ul d, ul e, ul f, ul g, ul h) {                                              \
        count();                                                                                                      \
        return theirs->call[n](a, b, c, d, e, f, g, h);                                                               \
    }
#define EACH(X)                                                                                                       \
    X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19)     \
    X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(28) X(29) X(30) X(31) X(32) X(33) X(34) X(35) X(36) X(37)       \
    X(38) X(39) X(40) X(41) X(42) X(43) X(44) X(45) X(46) X(47) X(48) X(49) X(50) X(51) X(52) X(53) X(54) X(55)       \
    X(56) X(57) X(58) X(59) X(60) X(61) X(62) X(63) X(64) X(65) X(66) X(67)
EACH(CALL)
#define NAME(n) call_##n,

ul C_GetFunctionList(struct list **list) {
    static const function calls[FUNCTIONS] = {EACH(NAME)};
    void *module = dlopen(getenv("DYING_MODULE"), RTLD_NOW | RTLD_LOCAL);
    ul (*get)(struct list **) = module ? (ul(*)(struct list **))dlsym(module, "C_GetFunctionList") : 0;
    if (!get || get(&theirs))
        return 5; /* CKR_GENERAL_ERROR */
    memcpy(ours.version, theirs->version, sizeof ours.version);
    memcpy(ours.call, calls, sizeof calls);
    *list = &ours;
    return 0;
}
