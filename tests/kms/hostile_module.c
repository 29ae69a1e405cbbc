/* A PKCS#11 module that is none: when it is loaded, it tries what it must not be able to do, and says what came of
 * it. Built and loaded by tests/kms/hsm.rs. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

static FILE *out;

static void tell(const char *what, int can) {
    fprintf(out, "%s %s\n", what, can ? "yes" : "no");
    fflush(out);
}

static int can_read(const char *path) { return open(path, O_RDONLY | O_CLOEXEC) >= 0; }

__attribute__((constructor)) static void try_all(void) {
    char path[4096];
    out = fopen(getenv("HOSTILE_OUT"), "we");
    if (!out)
        return;
    tell("begins", 1);
    tell("reads-the-root-key", can_read(getenv("HOSTILE_KEY")));
    tell("reads-the-log", can_read(getenv("HOSTILE_LOG")));
    snprintf(path, sizeof path, "%s.planted", getenv("HOSTILE_KEY"));
    tell("makes-a-file", open(path, O_WRONLY | O_CREAT, 0600) >= 0);
    tell("removes-the-log", unlink(getenv("HOSTILE_LOG")) == 0);
    snprintf(path, sizeof path, "/proc/%d/environ", getppid());
    tell("reads-its-parents-environment", can_read(path));
    snprintf(path, sizeof path, "/proc/%d/mem", getppid());
    tell("reads-its-parents-memory", can_read(path));
    tell("signals-its-parent", kill(getppid(), 0) == 0);
    tell("has-the-network", socket(AF_INET, SOCK_STREAM, 0) >= 0);
    tell("has-sockets", socket(AF_UNIX, SOCK_STREAM, 0) >= 0);
    tell("has-credentials", getenv("AWS_SECRET_ACCESS_KEY") || getenv("CREDENTIALS_DIRECTORY"));
    int inherited = 0;
    for (int fd = 3; fd < 2000; fd++) {
        struct stat found;
        if (fd != fileno(out) && fstat(fd, &found) == 0 && S_ISREG(found.st_mode))
            inherited = 1;
    }
    tell("has-files-of-others", inherited);
    pid_t child = fork();
    if (child == 0)
        _exit(0);
    tell("forks", child > 0);
    execl("/bin/true", "true", (char *)0);
    tell("executes", 0);
    tell("ends", 1);
}
