import { accessSync, constants } from 'node:fs';
import { KilnError } from '../errors.ts';
import type { VmConfig } from './vmm.ts';

/** Throws `failed-precondition` naming the first of kernel, initrd and guest image that cannot be read. */
export function requireGuestFiles({ kernel, initrd, guestImage }: VmConfig): void {
  requireReadable('the guest kernel', kernel);
  if (initrd !== undefined) requireReadable('the guest initrd', initrd);
  requireReadable('the guest image', guestImage);
}

function requireReadable(what: string, file: string): void {
  try {
    accessSync(file, constants.R_OK);
  } catch (error) {
    const reason = (error as NodeJS.ErrnoException).code ?? String(error);
    throw new KilnError('failed-precondition', `${what} ${file} cannot be read: ${reason}`, {
      hint: 'run `npm run setup` to build the guest, or correct the path in the [vm] section of the config file',
      cause: error,
    });
  }
}
