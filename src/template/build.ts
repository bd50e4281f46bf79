import { mkdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { KilnError } from '../errors.ts';
import { Guest } from '../guest/guest.ts';
import { abortable } from '../host/abortable.ts';
import { TimeLimit } from '../host/time-limit.ts';
import type { TemplateDriver, VmShape } from '../vmm/vmm.ts';
import { type MakeBlank, prime } from './prime.ts';

export interface BuildOptions {
  readonly driver: TemplateDriver;
  readonly shape: VmShape;
  readonly makeBlank: MakeBlank;
  /** Time for all of it, in ms. */
  readonly limitMs: number;
}

/**
 * Boots a VM, warms it up and saves it in an existing, empty directory. The VM is gone afterwards; what it has left in the
 * directory when this fails, the caller removes.
 */
export async function buildTemplate(directory: string, options: BuildOptions, signal: AbortSignal): Promise<void> {
  using limit = new TimeLimit(options.limitMs, signal);
  try {
    await build(directory, options, limit.signal);
  } catch (error) {
    if (!limit.caused(error)) throw error;
    throw new KilnError(
      'deadline-exceeded',
      `no virtual machine was booted and saved within ${options.limitMs / 1000} s`,
    );
  }
}

async function build(directory: string, options: BuildOptions, signal: AbortSignal): Promise<void> {
  const { driver, shape, limitMs, makeBlank } = options;
  const vmDirectory = vmDirectoryIn(directory);
  await mkdir(vmDirectory, { mode: 0o700 });
  {
    await using vm = await driver.boot({ ...shape, id: 'template', directory: vmDirectory }, directory, signal);
    const socket = await vm.acceptAgent(signal);
    const hello = { hostname: 'kiln', session: '', becomesTemplate: true, answerLimitMs: limitMs };
    {
      using guest = await abortable(Guest.connect(socket, hello), signal);
      await prime({ guest, vm, directory: vmDirectory, makeBlank }, signal);
    }
    // Once more, so that the agent waits for the first words of a host when it is saved: the clone's.
    await vm.acceptAgent(signal);
    await vm.save(signal);
  }
  await rm(vmDirectory, { recursive: true });
}

/** Where the VM has its directory while its template is made. */
export function vmDirectoryIn(template: string): string {
  return path.join(template, 'vm');
}
