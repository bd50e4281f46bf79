import path from 'node:path';
import { KilnError } from '../../errors.ts';
import { requireSocketPath } from '../../host/unix-socket.ts';

/**
 * Where the kilnd of a state folder listens.
 * @throws {KilnError} `invalid-argument` for a folder that is not absolute or whose socket path would be too long.
 */
export function controlSocketPath(stateDir: string): string {
  return socketPathIn(stateDir, 'kilnd.sock');
}

/** Where it listens for relays. Throws as {@link controlSocketPath} does. */
export function relaySocketPath(stateDir: string): string {
  return socketPathIn(stateDir, 'relay.sock');
}

function socketPathIn(stateDir: string, name: string): string {
  if (!path.isAbsolute(stateDir)) {
    throw new KilnError('invalid-argument', `the state folder ${JSON.stringify(stateDir)} is not an absolute path`);
  }
  const socketPath = path.join(stateDir, name);
  requireSocketPath(socketPath, 'invalid-argument');
  return socketPath;
}
