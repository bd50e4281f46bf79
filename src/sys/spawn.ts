/**
 * posix_spawnp(3). Node's own `spawn` forks: the kernel copies the page tables of all of Node's memory, and afterwards each
 * page that Node writes to costs a fault. Here the new process borrows the memory until it is another program, while
 * this thread waits.
 *
 * It is a child of ours that Node knows nothing of: whoever starts it waits for it (process.ts).
 */
import { SysError } from './error.ts';
import { check, declare } from './libc.ts';

/** Flags of <spawn.h>, glibc. */
const POSIX_SPAWN_SETSIGDEF = 0x04;
const POSIX_SPAWN_SETSIGMASK = 0x08;
const POSIX_SPAWN_SETSID = 0x80;

/** More than glibc's posix_spawnattr_t (336 bytes), posix_spawn_file_actions_t (80) and sigset_t (128) have. */
const OPAQUE_SIZE = 512;
const SIGSET_SIZE = 128;

/** open(2). */
const O_RDWR = 2;

type Memory = Uint8Array;

const cSpawn = declare<
  [pid: Int32Array, path: string, actions: Memory, attributes: Memory, argv: Strings, envp: Strings]
>('int posix_spawnp(int *pid, const char *path, void *fa, void *attr, const char **argv, const char **envp)');
const cActionsInit = declare<[actions: Memory]>('int posix_spawn_file_actions_init(void *fa)');
const cActionsDestroy = declare<[actions: Memory]>('int posix_spawn_file_actions_destroy(void *fa)');
const cAddOpen = declare<[actions: Memory, fd: number, path: string, flags: number, mode: number]>(
  'int posix_spawn_file_actions_addopen(void *fa, int fd, const char *path, int oflag, unsigned int mode)',
);
const cAddDup2 = declare<[actions: Memory, fd: number, as: number]>(
  'int posix_spawn_file_actions_adddup2(void *fa, int fildes, int newfildes)',
);
const cAddClose = declare<[actions: Memory, fd: number]>('int posix_spawn_file_actions_addclose(void *fa, int fd)');
const cAddChdir = declare<[actions: Memory, path: string]>(
  'int posix_spawn_file_actions_addchdir_np(void *fa, const char *path)',
);
const cAttrInit = declare<[attributes: Memory]>('int posix_spawnattr_init(void *attr)');
const cSetFlags = declare<[attributes: Memory, flags: number]>('int posix_spawnattr_setflags(void *attr, short flags)');
const cSetSigDefault = declare<[attributes: Memory, signals: Memory]>(
  'int posix_spawnattr_setsigdefault(void *attr, const void *sigdefault)',
);
const cSetSigMask = declare<[attributes: Memory, signals: Memory]>(
  'int posix_spawnattr_setsigmask(void *attr, const void *sigmask)',
);

/** Ends with null, as C wants it. */
type Strings = readonly (string | null)[];

export interface Spawn {
  /** The program's file; a name is looked up in our own PATH. */
  readonly path: string;
  /** Without the program's name. */
  readonly args: readonly string[];
  readonly env: Readonly<Record<string, string | undefined>>;
  readonly workingDirectory: string;
  /** What it gets as its descriptors 0, 1, 2 and so on; null is /dev/null. All others of ours are to be close-on-exec. */
  readonly fds: readonly (number | null)[];
}

/**
 * Starts a program in a session of its own, with no signal blocked or ignored. It runs when this returns. The kernel
 * lets go of us in the middle of execve(2) (begin_new_exec of fs/exec.c): that our close-on-exec descriptors are closed
 * in it, and its command line and environment can be seen in /proc, takes a moment more.
 *
 * @returns its process id
 * @throws SysError of posix_spawnp(3), execve(2), chdir(2): ENOENT, EACCES …
 */
export function posixSpawn({ path, args, env, workingDirectory, fds }: Spawn): number {
  const actions = new Uint8Array(OPAQUE_SIZE);
  const attributes = new Uint8Array(OPAQUE_SIZE);
  const pid = new Int32Array(1);
  ok(cActionsInit(actions));
  try {
    placeDescriptors(actions, fds);
    ok(cAddChdir(actions, workingDirectory));
    ok(cAttrInit(attributes));
    ok(cSetSigDefault(attributes, new Uint8Array(SIGSET_SIZE).fill(0xff)));
    ok(cSetSigMask(attributes, new Uint8Array(SIGSET_SIZE)));
    ok(cSetFlags(attributes, POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSID));
    const environment = Object.entries(env).flatMap(([name, value]) => (value === undefined ? [] : `${name}=${value}`));
    ok(cSpawn(pid, path, actions, attributes, [path, ...args, null], [...environment, null]), path);
  } finally {
    check(cActionsDestroy(actions), 'posix_spawn_file_actions_destroy');
  }
  return pid[0] ?? 0;
}

/** By way of numbers that nobody uses where a descriptor lies where another may be to go. */
function placeDescriptors(actions: Memory, fds: readonly (number | null)[]): void {
  const given = fds.filter((fd) => fd !== null);
  const inTheWay = given.some((fd) => fd < fds.length);
  const free = Math.max(fds.length, ...given.map((fd) => fd + 1));
  if (inTheWay) for (const [index, fd] of fds.entries()) if (fd !== null) ok(cAddDup2(actions, fd, free + index));
  for (const [index, fd] of fds.entries()) {
    if (fd === null) ok(cAddOpen(actions, index, '/dev/null', O_RDWR, 0));
    else ok(cAddDup2(actions, inTheWay ? free + index : fd, index));
    if (fd !== null && inTheWay) ok(cAddClose(actions, free + index));
  }
}

/** These functions return the error. */
function ok(error: number, path?: string): void {
  if (error !== 0) throw new SysError(error, 'posix_spawn', path);
}
