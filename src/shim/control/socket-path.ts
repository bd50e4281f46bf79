import path from 'node:path';
import { KilnError } from '../../errors.ts';

/** sun_path has 108 bytes with its NUL, unix(7). Node cuts a longer path short and says nothing. */
const socketPathLimit = 107;

/**
 * Where the kilnd of a state folder listens.
 * @throws {KilnError} `invalid-argument` for a folder that is not absolute or whose socket path would be too long.
 */
export function controlSocketPath(stateDir: string): string {
  if (!path.isAbsolute(stateDir)) {
    throw new KilnError('invalid-argument', `the state folder ${JSON.stringify(stateDir)} is not an absolute path`);
  }
  const socketPath = path.join(stateDir, 'kilnd.sock');
  const length = Buffer.byteLength(socketPath);
  if (length > socketPathLimit) {
    throw new KilnError(
      'invalid-argument',
      `the socket path ${socketPath} has ${length} bytes, the system's limit is ${socketPathLimit}`,
      { hint: 'choose a shorter KILN_STATE_DIR' },
    );
  }
  return socketPath;
}
