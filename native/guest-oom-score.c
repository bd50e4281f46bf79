/* Becomes another program, with an OOM score of its own: kiln-oom-score SCORE PROGRAM [ARGUMENT...]
 *
 * SCORE is an oom_score_adj, proc(5). Exits 1 with a sentence on stderr when there is no such score, or no such program.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int fail(const char *what) {
  dprintf(STDERR_FILENO, "%s: %s\n", what, strerror(errno));
  return 1;
}

int main(int argc, char **argv) {
  if (argc < 3) {
    dprintf(STDERR_FILENO, "usage: kiln-oom-score SCORE PROGRAM [ARGUMENT...]\n");
    return 1;
  }
  int file = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
  if (file == -1 || write(file, argv[1], strlen(argv[1])) == -1) return fail(argv[1]);
  execvp(argv[2], argv + 2);
  return fail(argv[2]);
}
