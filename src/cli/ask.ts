import { pathsFromEnv } from '../config/paths.ts';
import { KilnError } from '../errors.ts';
import { controlCall } from '../shim/control/client.ts';
import type { OperatorRequest } from '../shim/control/request.ts';

/** A kilnd that works answers at once. In ms. */
const answerLimitMs = 60_000;

/** Asks the kilnd of the state folder (KILN_STATE_DIR), for at most a minute unless a signal says otherwise. @throws KilnError with kilnd's words when it refuses */
export async function ask(
  request: OperatorRequest,
  signal: AbortSignal = AbortSignal.timeout(answerLimitMs),
): Promise<Uint8Array> {
  const { stateDir } = pathsFromEnv({ env: process.env, guestDir: '/' });
  const { exitCode, stdout } = await controlCall(stateDir, request, { signal });
  if (exitCode !== 0) throw new KilnError('unknown', Buffer.from(stdout).toString().trim());
  return stdout;
}
