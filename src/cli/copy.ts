import { lstatSync, mkdtempSync, openSync, rmSync, statSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { pipeline } from 'node:stream/promises';
import { Command } from 'commander';
import { KilnError } from '../errors.ts';
import { packFiles } from '../files/pack.ts';
import { Place } from '../files/place.ts';
import { FilesError, shown } from '../files/tar-entry.ts';
import { describeLeftOut, unpackFiles } from '../files/unpack.ts';
import { listenPrivately } from '../host/unix-socket.ts';
import type { CopyRequest } from '../shim/control/request.ts';
import { ask } from './ask.ts';

interface CopyOptions {
  readonly namespace: string;
  readonly archive?: true;
}

/** setuid and setgid are left out: a guest's program must not become the caller's. */
const plainMode = 0o1777;

/** As in src/daemon/copy.ts. */
const goneWords = 'nobody takes the files any more';

/** Extended attributes that are a file's own. */
const ownXattr = /^(user\.(?!overlay\.)|security\.capability$|system\.posix_acl_(access|default)$)/;

/** `kiln cp`: what `nerdctl cp` cannot do, since a running container's files are in its guest. */
export function copyCommand(): Command {
  return new Command('cp')
    .description('copy files between a running container and the host, or a tar stream ("-"); as docker cp')
    .argument('<source>', 'a path, ID:PATH, or "-" for a tar stream; PATH/. is what is in a directory')
    .argument('<target>', 'a path, ID:PATH, or "-" for a tar stream')
    .option('-n, --namespace <name>', "containerd's namespace", 'default')
    .option('-a, --archive', 'keep owners, set-user-id bits and extended attributes')
    .action(async (source: string, target: string, options: CopyOptions) => {
      const [from, to] = [placeOf(source), placeOf(target)];
      if ((from.id === undefined) === (to.id === undefined)) {
        throw new KilnError(
          'invalid-argument',
          'one of source and target must be ID:PATH, and the other a path or "-"',
        );
      }
      try {
        if (from.id !== undefined) await copyOut({ id: from.id, path: from.path }, target, options);
        else await copyIn(source, { id: to.id ?? '', path: to.path }, options);
      } catch (error) {
        throw error instanceof FilesError ? new KilnError(error.code, error.message, { cause: error }) : error;
      }
    });
}

interface InContainer {
  readonly id: string;
  readonly path: string;
}

/** As docker has it: what has a colon is in a container, unless a slash or a dot comes first. */
function placeOf(text: string): { readonly id?: string; readonly path: string } {
  const match = /^([^./:][^:/]*):(.*)$/s.exec(text);
  if (match === null) return { path: text };
  const given = match[2] ?? '';
  return { id: match[1] ?? '', path: given.startsWith('/') ? given : `/${given}` };
}

async function copyOut({ id, path: source }: InContainer, target: string, options: CopyOptions): Promise<void> {
  const request = requestOf(id, source, options, 'out');
  if (target === '-') {
    await withStream(request, (socket) => pipeline(socket, process.stdout, { end: false }));
    return;
  }
  const isDirectory = statSync(target, { throwIfNoEntry: false })?.isDirectory() ?? false;
  const isContents = /\/\.?$/.test(source);
  const name = isContents ? '' : path.posix.basename(source);
  const [directory, as] = isDirectory ? [target, name] : [path.dirname(target), path.basename(target)];
  using place = openDirectory(directory);
  const prefix = isContents ? '.' : Buffer.from(name).toString('latin1');
  const to = Buffer.from(as).toString('latin1');
  const keep = options.archive === true;
  await withStream(request, async (socket) => {
    const unpacked = await unpackFiles(socket as AsyncIterable<Buffer>, place, {
      walk: 'beneath',
      taken: 'same-kind',
      marks: 'refuse',
      devices: 'leave-out',
      xattr: (attribute) => (keep && ownXattr.test(attribute) ? attribute : undefined),
      owner: keep ? undefined : { uid: process.getuid?.() ?? 0, gid: process.getgid?.() ?? 0 },
      modeMask: keep ? undefined : plainMode,
      rename: (given) => renamed(given, prefix, to),
    });
    if (unpacked.leftOutCount === 0) return;
    process.stderr.write(`kiln: devices were not copied: ${describeLeftOut(unpacked)}\n`);
  });
}

/** The path with another beginning. @throws FilesError for one that does not begin so */
function renamed(given: string, prefix: string, to: string): string {
  if (given !== prefix && !given.startsWith(`${prefix}/`)) {
    throw new FilesError('invalid-argument', `the guest sends ${shown(given)}, which was not asked for`);
  }
  const rest = given.slice(prefix.length + 1);
  return to === '' || rest === '' ? to + rest : `${to}/${rest}`;
}

async function copyIn(source: string, { id, path: target }: InContainer, options: CopyOptions): Promise<void> {
  if (source === '-') {
    await withStream(requestOf(id, target, options, 'in'), (socket) => pipeline(process.stdin, socket));
    return;
  }
  if (lstatSync(source, { throwIfNoEntry: false }) === undefined) {
    throw new KilnError('not-found', `${source}: no such file or directory`);
  }
  const isContents = /(^|\/)\.$/.test(source);
  const probe = await ask({ ...requestOf(id, target, options, 'probe'), socket: '' });
  const isDirectory = Buffer.from(probe).toString() === 'directory';
  const name = Buffer.from(path.basename(path.resolve(source))).toString('latin1');
  const asTarget = Buffer.from(path.posix.basename(target)).toString('latin1');
  const [directory, as] = isDirectory ? [target, isContents ? '.' : name] : [path.posix.dirname(target), asTarget];
  if (!isDirectory && target.endsWith('/')) {
    throw new KilnError('not-found', `there is no directory ${target} in container ${id}`);
  }
  using place = openDirectory(isContents ? source : path.dirname(path.resolve(source)));
  const what = isContents ? { place, as, withoutTop: isDirectory } : { place, name, as };
  const keep = options.archive === true;
  const xattr = (attribute: string) => (keep && ownXattr.test(attribute) ? attribute : undefined);
  await withStream(requestOf(id, directory, options, 'in'), (socket) => pipeline(packFiles(what, { xattr }), socket));
}

function requestOf(
  id: string,
  inContainer: string,
  { namespace, archive }: CopyOptions,
  direction: CopyRequest['direction'],
): Omit<CopyRequest, 'socket'> {
  return { kind: 'copy', namespace, id, direction, path: inContainer, keepOwners: archive === true };
}

/** Has kilnd dial a socket of ours, and answers when it says that all is done. What kilnd says is the error. */
async function withStream(
  request: Omit<CopyRequest, 'socket'>,
  use: (socket: Socket) => Promise<unknown>,
): Promise<void> {
  const directory = mkdtempSync(path.join(tmpdir(), 'kiln-cp-'));
  const server = createServer({ allowHalfOpen: true });
  try {
    const socketPath = path.join(directory, 's');
    await listenPrivately(server, socketPath);
    const given = new AbortController();
    const used = accept(server, given.signal).then(async (socket) => {
      try {
        await use(socket);
      } finally {
        socket.destroy();
      }
    });
    used.catch(() => {});
    const answered = ask({ ...request, socket: socketPath }, given.signal);
    // It may have failed before it dialled.
    answered.catch((error: unknown) => given.abort(error));
    const [answer, local] = await Promise.allSettled([answered, used]);
    if (answer.status === 'rejected' && !nobodyTakes(answer.reason)) throw answer.reason;
    if (local.status === 'rejected') throw local.reason;
    if (answer.status === 'rejected') throw answer.reason;
  } finally {
    server.close();
    rmSync(directory, { recursive: true, force: true });
  }
}

/** Our own failure, as kilnd sees it. */
function nobodyTakes(error: unknown): boolean {
  return error instanceof KilnError && error.message.includes(goneWords);
}

function accept(server: Server, signal: AbortSignal): Promise<Socket> {
  const { promise, resolve, reject } = Promise.withResolvers<Socket>();
  server.once('connection', resolve);
  signal.addEventListener('abort', () => reject(signal.reason), { once: true });
  return promise;
}

function openDirectory(directory: string): Place {
  try {
    return new Place(openSync(directory, 'r'));
  } catch (cause) {
    throw new KilnError('not-found', `cannot open the directory ${directory}: ${(cause as Error).message}`, { cause });
  }
}
