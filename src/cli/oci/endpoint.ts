/** A container's endpoint in kilnd: made and ended by the launcher, as containerd does, so that kilnd starts on demand. */
import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import path from 'node:path';
import type { Readable } from 'node:stream';
import { buffer } from 'node:stream/consumers';
import { KilnError } from '../../errors.ts';
import { isIdentifier } from '../../shim/control/request.ts';

/** Beside the `kiln` command: the bundle is dist/lib/kiln.mjs. */
const launcher = path.resolve(import.meta.dirname, '../bin/containerd-shim-kiln-v2');

/** What kilnd calls a container of the command line. */
export interface EndpointName {
  /** One for each `--root`. */
  readonly namespace: string;
  readonly id: string;
}

export function endpointName(root: string, id: string): EndpointName {
  return { namespace: `oci-${hash(root)}`, id: isIdentifier(id) ? id : `id-${hash(id)}` };
}

function hash(text: string): string {
  return createHash('sha256').update(text).digest('hex').slice(0, 16);
}

/** Makes the endpoint, or finds it. @returns the path of the socket of its task service */
export async function startEndpoint(name: EndpointName, bundle: string): Promise<string> {
  const answer = await run(name, bundle, 'start');
  return answer
    .toString()
    .trim()
    .replace(/^unix:\/\//, '');
}

/** Ends the endpoint with all that is left of its task. One that is not there is no error. */
export async function deleteEndpoint(name: EndpointName, bundle: string): Promise<void> {
  await run(name, bundle, 'delete');
}

/** @throws KilnError unavailable with the launcher's words, which it writes to stdout */
async function run({ namespace, id }: EndpointName, bundle: string, action: 'start' | 'delete'): Promise<Buffer> {
  // What containerd says in its environment is not for this: the answer is to be plain text, and nobody takes events.
  const { MAX_SHIM_VERSION: _version, TTRPC_ADDRESS: _events, ...env } = process.env;
  const args = ['-namespace', namespace, '-id', id, '-bundle', bundle, action];
  const child = spawn(launcher, args, {
    cwd: action === 'start' ? bundle : '/',
    env,
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const [output, [code]] = await Promise.all([buffer(child.stdout as Readable), once(child, 'exit')]);
  if (code !== 0) throw new KilnError('unavailable', output.toString().trim() || `${launcher} failed`);
  return output;
}
