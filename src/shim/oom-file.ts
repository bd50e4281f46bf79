/**
 * How podman and CRI-O learn that a container has run out of memory: by an empty file `oom` in its bundle. It is their conmon that
 * makes it, when the control group of the process on the host tells (conmon src/cgroup.c, write_oom_files). Memory runs out in
 * the guest, of which the host's groups do not know; so it is made here.
 */
import { writeFileSync } from 'node:fs';
import path from 'node:path';
import { forLog } from '../errors.ts';
import type { Logger } from '../observe/logger.ts';
import type { Spec } from '../oci/spec.ts';

/** As podman and CRI-O call themselves in a spec. */
const readers = new Set(['libpod', 'cri-o']);

/** The file that whoever has made the bundle looks for; empty for nobody. */
export function oomFileOf(bundle: string, { annotations = {} }: Pick<Spec, 'annotations'>): string {
  return readers.has(annotations['io.container.manager'] ?? '') ? path.join(bundle, 'oom') : '';
}

/** Done when it returns, for the container's process is to end only then. Never throws. */
export function noteOom(file: string, logger: Logger): void {
  try {
    writeFileSync(file, '', { flag: 'wx' });
  } catch (error) {
    // It has run out of memory before.
    if ((error as NodeJS.ErrnoException).code === 'EEXIST') return;
    logger.warn({ err: forLog(error) }, 'cannot note that the container has run out of memory');
  }
}
