import { constants } from 'node:os';
import { expect } from 'vitest';
import { NinePError } from '../../support/ninep.ts';

export const errno = constants.errno;

/** That the server refuses, and with which error. */
export async function fails(request: Promise<unknown>, code: number): Promise<void> {
  const error = await request.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(NinePError);
  expect((error as NinePError).errno).toBe(code);
}
