/**
 * What makes a guest one of its own. A virtual machine that was restored from a template has its memory, and with it the
 * state of every generator of random numbers and each id that was made before.
 *
 * Of the kernel's ids, boot_id is made when it is read first: no template reads it.
 */
import { generateKeyPairSync, randomUUID } from 'node:crypto';
import { closeSync, openSync, readSync, writeFileSync } from 'node:fs';
import { Duplex } from 'node:stream';
import { connect } from 'node:tls';
import type { Identity, SampleRandomnessResponse } from '../gen/kiln/agent/v1/agent.ts';
import { getrandom, reseedKernel, reseedOpenssl } from '../src/sys/random.ts';
import { AgentError } from './errors.ts';

/** /etc/machine-id of the image is a link to it. */
const machineIdFile = '/run/machine-id';

/** Less would not make up for what the twins know of each other: 256 bits, as the kernel's own seed. */
const leastEntropy = 32;

/** @throws AgentError invalid-argument */
export function takeIdentity({ entropy, machineId }: Identity): void {
  if (entropy.length < leastEntropy) {
    throw new AgentError('invalid-argument', `${entropy.length} bytes of entropy are fewer than ${leastEntropy}`);
  }
  if (!/^[0-9a-f]{32}$/.test(machineId)) throw new AgentError('invalid-argument', `"${machineId}" is no machine id`);
  // The kernel first: the agent's own generator asks it.
  reseedKernel(entropy);
  reseedOpenssl(entropy);
  writeFileSync(machineIdFile, `${machineId}\n`);
}

/** See SampleRandomnessResponse. */
export async function sampleRandomness(): Promise<SampleRandomnessResponse> {
  const { publicKey } = generateKeyPairSync('ed25519');
  return {
    kernel: getrandom(sampleBytes),
    urandom: fromUrandom(),
    uuid: randomUUID(),
    tls: await tlsRandom(),
    publicKey: publicKey.export({ type: 'spki', format: 'der' }),
  };
}

const sampleBytes = 32;

function fromUrandom(): Buffer {
  const bytes = Buffer.alloc(sampleBytes);
  const fd = openSync('/dev/urandom', 'r');
  try {
    readSync(fd, bytes);
  } finally {
    closeSync(fd);
  }
  return bytes;
}

/** Before `random` in a TLS record with a ClientHello: record header, handshake header, version. RFC 8446, 4.1.2, 5.1. */
const beforeRandom = 5 + 4 + 2;

async function tlsRandom(): Promise<Buffer> {
  const { promise, resolve, reject } = Promise.withResolvers<Buffer>();
  const wire = new Duplex({
    read: () => {},
    write: (chunk: Buffer, _encoding, done) => {
      resolve(chunk.subarray(beforeRandom, beforeRandom + sampleBytes));
      done();
    },
  });
  const client = connect({ socket: wire, ca: [] });
  client.on('error', reject);
  try {
    return await promise;
  } finally {
    client.destroy();
  }
}
