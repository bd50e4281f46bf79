/**
 * Changing a container's limits while it runs: writing the files of its control group. Not by `crun update`: 1.8 sets a
 * period without a quota to "no quota", needs the memory limit for one of swap, and leaves half of the limits changed when
 * one is refused.
 */
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { CgroupFile } from '../gen/kiln/agent/v1/agent.ts';
import { AgentError } from './errors.ts';

/** A controller's own file; `cgroup.*` moves, freezes and kills processes. */
const limitFile = /^(?!cgroup\.)[a-z0-9]+(\.[A-Za-z0-9_]+)+$/;

/** What the kernel means by its errors when a limit is written. */
const reasons: Record<string, string> = {
  ENOENT: "the guest's kernel has no such limit",
  EINVAL: 'the kernel refuses the value',
  ERANGE: 'the value is out of range',
  EBUSY: 'more than that is in use',
};

/**
 * Writes all files, or changes nothing. Asynchronous, because a memory limit below what is used is written for as long as
 * the kernel needs to make room.
 *
 * @throws AgentError invalid-argument, with the file and the kernel's reason
 */
export async function setLimits(cgroup: string, files: readonly CgroupFile[]): Promise<void> {
  for (const { name } of files) {
    if (!limitFile.test(name)) throw new AgentError('invalid-argument', `"${name}" is no file of a limit`);
  }
  const before: CgroupFile[] = [];
  try {
    for (const { name, content } of files) {
      const old = await attempt(name, content, () => readFile(join(cgroup, name), 'utf8'));
      before.unshift({ name, content: old });
      await attempt(name, content, () => write(cgroup, name, content));
    }
  } catch (error) {
    for (const { name, content } of before) {
      // What the group had is a value that the kernel takes, except where it is none (cpu.max.burst above the quota).
      await write(cgroup, name, content).catch(() => {});
    }
    throw error;
  }
}

/** Line by line, as the kernel takes one setting in a write(2). A line's end of its own clears what may be empty. */
async function write(cgroup: string, name: string, content: string): Promise<void> {
  for (const line of content.trimEnd().split('\n')) {
    // r+, so that nothing is created where no such file is.
    await writeFile(join(cgroup, name), `${line}\n`, { flag: 'r+' });
  }
}

async function attempt<T>(name: string, content: string, action: () => Promise<T>): Promise<T> {
  try {
    return await action();
  } catch (error) {
    const { code = '' } = error as NodeJS.ErrnoException;
    const reason = reasons[code] ?? (error as Error).message;
    throw new AgentError('invalid-argument', `cannot set ${name} to ${JSON.stringify(content)}: ${reason}`, {
      cause: error,
    });
  }
}
