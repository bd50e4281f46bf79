import { mkdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { Guest } from '../guest/guest.ts';
import { abortable } from '../vmm/abortable.ts';
import type { TemplateDriver } from '../vmm/vmm.ts';
import type { VmShape } from './key.ts';
import { prime } from './prime.ts';

export interface BuildOptions {
  readonly driver: TemplateDriver;
  readonly shape: VmShape;
  /** Time for each answer of VMM and agent, in ms. */
  readonly answerLimitMs: number;
}

/**
 * Boots a VM, warms it up and saves it in an existing, empty directory. The VM is gone afterwards; what it has left in the
 * directory when this fails, the caller removes.
 */
export async function buildTemplate(
  directory: string,
  { driver, shape, answerLimitMs }: BuildOptions,
  signal: AbortSignal,
): Promise<void> {
  const vmDirectory = path.join(directory, 'vm');
  await mkdir(vmDirectory, { mode: 0o700 });
  {
    await using vm = await driver.boot({ ...shape, id: 'template', directory: vmDirectory }, directory, signal);
    const socket = await vm.acceptAgent(signal);
    const hello = { hostname: '', session: '', becomesTemplate: true, answerLimitMs };
    {
      using guest = await abortable(Guest.connect(socket, hello), signal);
      await prime(guest, signal);
    }
    // Once more, so that the agent waits for the first words of a host when it is saved: the clone's.
    await vm.acceptAgent(signal);
    await vm.save(signal);
  }
  await rm(vmDirectory, { recursive: true });
}
