/** What an earlier kilnd of the same state folder has left: tasks to take over, and the remains of what is no task. */
import { existsSync, readdirSync, rmSync } from 'node:fs';
import path from 'node:path';
import { clearControlGroup } from '../host/control-group.ts';
import type { Logger } from '../observe/logger.ts';
import { readContainerRecord } from '../sandbox/record.ts';
import { toTaskBefore } from '../shim/status.ts';
import type { TaskBefore } from '../shim/task.ts';
import { isStarted } from '../shim/task-events.ts';
import { readTaskRecord, removeTaskRecord, type TaskRecord, type TaskState } from '../shim/task-record.ts';
import { endRemains } from './remains.ts';

/** Where the records of tasks lie, each under its endpoint's key. */
export function taskFile(stateDir: string, key: string): string {
  return path.join(stateDir, 't', `${key}.json`);
}

/** The private directory of a container. */
export function containerDirectory(stateDir: string, key: string): string {
  return path.join(stateDir, 'c', key);
}

/** Where the virtual machines of the pool have their directories, in the state folder. */
export const poolName = 'p';

/** What is known of a container that is not taken over yet, as State has it. Its task has this state. */
export function knownOf(directory: string, state: TaskState): TaskBefore {
  try {
    const record = readContainerRecord(directory);
    return toTaskBefore(record, record?.place === 'pod' ? record.started : isStarted(state));
  } catch {
    // Whoever takes it over tells why.
    return toTaskBefore(undefined, false);
  }
}

/**
 * The tasks that are written down, by key. Everything else is ended and removed: a Create that was under way (it is begun
 * anew when its request comes again), and what containerd has forgotten meanwhile, whose bundle is gone.
 */
export async function takeStock(stateDir: string, logger: Logger): Promise<Map<string, TaskRecord>> {
  const tasks = new Map<string, TaskRecord>();
  for (const name of listDirectory(path.join(stateDir, 't'))) {
    const key = name.replace(/\.json$/, '');
    const file = path.join(stateDir, 't', name);
    const record = name.endsWith('.json') ? readRecord(file, logger) : undefined;
    if (record !== undefined && existsSync(record.context.bundle)) tasks.set(key, record);
    else removeTaskRecord(file);
  }
  const pooled = new Set([...tasks.keys()].map((key) => vmDirectoryOf(containerDirectory(stateDir, key))));
  const waiting = listDirectory(path.join(stateDir, poolName)).map((name) => path.join(stateDir, poolName, name));
  // A record without a task is of one that was deleted; what lies there then is of the next one's Create.
  const unknown = listDirectory(path.join(stateDir, 'c')).filter((key) => {
    const state = tasks.get(key)?.state;
    return state?.create === undefined && state?.sandbox === undefined;
  });
  const left = [
    ...unknown.map((key) => containerDirectory(stateDir, key)),
    ...waiting.filter((directory) => !pooled.has(directory)),
  ];
  const killed: number[] = [];
  const ended: string[] = [];
  for (const directory of left) {
    try {
      killed.push(...(await endRemains(directory)));
      ended.push(directory);
    } catch (error) {
      // One that cannot be removed is in the way of one container, and no reason to serve none.
      logger.error({ err: error, directory }, 'cannot end what an earlier kilnd left behind');
    }
  }
  // Afterwards, since a control group has processes of several directories: of a pod's containers, of a VM from the pool.
  for (const directory of ended) {
    await clearControlGroup(directory, logger);
    try {
      rmSync(directory, { recursive: true, force: true });
    } catch (error) {
      logger.error({ err: error, directory }, 'cannot remove what an earlier kilnd left behind');
    }
  }
  if (left.length > 0)
    logger.warn(
      { killed, directories: left.map((directory) => path.basename(directory)) },
      'cleared what an earlier kilnd left behind',
    );
  return tasks;
}

/** The directory of a container's virtual machine, where that came from the pool. */
function vmDirectoryOf(directory: string): string | undefined {
  try {
    const record = readContainerRecord(directory);
    return record?.place === 'member' ? undefined : record?.vmDirectory;
  } catch {
    return undefined; // Whoever takes the container over tells why.
  }
}

function readRecord(file: string, logger: Logger): TaskRecord | undefined {
  try {
    return readTaskRecord(file);
  } catch (error) {
    logger.error({ err: error, file }, 'cannot read what an earlier kilnd has written down: its task is lost');
    return undefined;
  }
}

function listDirectory(directory: string): string[] {
  try {
    return readdirSync(directory);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw error;
  }
}
