/** `kiln cp`, from kilnd's side: a tar stream between a container and a socket that the command listens on. */
import { once } from 'node:events';
import { connect, type Socket } from 'node:net';
import { KilnError } from '../errors.ts';
import type { ContainerFiles } from '../sandbox/container-files.ts';
import type { ControlReply, CopyRequest } from '../shim/control/request.ts';
import type { Endpoint } from '../shim/endpoint.ts';

/**
 * Answers when everything is copied.
 *
 * @throws KilnError not-found for a container that is not there, failed-precondition for one that has ended; what the guest says
 */
export async function copyFiles(endpoints: readonly Endpoint[], request: CopyRequest): Promise<ControlReply> {
  const { direction, path, socket: socketPath, keepOwners } = request;
  const files = filesOf(endpoints, request);
  if (direction === 'probe') return answer((await isDirectory(files, path)) ? 'directory' : 'other');
  const socket = connect({ path: socketPath });
  // The loops below report errors; one that comes after them has nobody else to go to.
  socket.on('error', () => {});
  try {
    await once(socket, 'connect');
    if (direction === 'out') await sendAll(files.read(path), socket);
    else await files.write(path, socket as AsyncIterable<Buffer>, keepOwners);
  } finally {
    socket.destroy();
  }
  return answer('');
}

function filesOf(endpoints: readonly Endpoint[], { namespace, id }: CopyRequest): ContainerFiles {
  const inNamespace = endpoints.filter(
    (endpoint) => endpoint.namespace === namespace && endpoint.container !== undefined,
  );
  const exact = inNamespace.filter((endpoint) => endpoint.id === id);
  const found = exact.length > 0 ? exact : inNamespace.filter((endpoint) => endpoint.id.startsWith(id));
  const [first] = found;
  if (first === undefined) {
    throw new KilnError('not-found', `Kiln runs no container ${id} in the namespace ${namespace}`, {
      hint: 'give its id, or how that begins; "kiln status" shows them. Names are containerd\'s clients\' own',
    });
  }
  if (found.length > 1) {
    throw new KilnError(
      'invalid-argument',
      `${found.length} containers in the namespace ${namespace} begin with ${id}`,
    );
  }
  const files = first.container?.files;
  if (files !== undefined) return files;
  throw new KilnError('failed-precondition', `container ${first.id} does not run`, {
    hint: 'what a stopped container has written is in its snapshot, where "nerdctl cp" finds it',
  });
}

async function isDirectory(files: ContainerFiles, path: string): Promise<boolean> {
  const stream = files.read(`${path}/.`);
  try {
    await stream.next();
    return true;
  } catch (error) {
    if (error instanceof KilnError && (error.code === 'not-found' || error.code === 'failed-precondition'))
      return false;
    throw error;
  } finally {
    await stream.return(undefined);
  }
}

async function sendAll(stream: AsyncIterable<Buffer>, socket: Socket): Promise<void> {
  for await (const piece of stream) {
    if (socket.destroyed) throw new KilnError('canceled', 'nobody takes the files any more');
    if (!socket.write(piece)) await Promise.race([once(socket, 'drain'), once(socket, 'close')]);
  }
  const sent = once(socket, 'finish');
  socket.end();
  await sent;
}

function answer(text: string): ControlReply {
  return { exitCode: 0, stdout: Buffer.from(text) };
}
