/** A file server with one volume or more, and a raw client at its connection. */
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { Socket } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach } from 'vitest';
import { type Volume, VolumeServer } from '../../../src/volume/server.ts';
import { NinePClient } from '../../support/ninep.ts';
import { projectRoot } from '../../support/paths.ts';
import { socketPair } from '../../support/socket-pair.ts';

export const program = path.join(projectRoot, 'dist', 'libexec', 'kiln-volumes');

/** A volume with what is not said left at no. */
export function volume(options: Pick<Volume, 'source'> & Partial<Volume>): Volume {
  return { readOnly: 'no', recursive: false, follows: false, ...options };
}

export interface Share {
  /** Everything of this share. */
  readonly folder: string;
  /** Of volume 0. */
  readonly source: string;
  /** The sandbox's, as far as the server knows. */
  readonly directory: string;
  readonly server: VolumeServer;
  readonly client: NinePClient;
}

type MoreVolumes = (folder: string) => readonly (Pick<Volume, 'source'> & Partial<Volume>)[];

/**
 * Makes shares that go after each test. Volume 0 is an empty directory, and those after it are what `more` says, which can
 * also make their sources.
 */
export function useShares(): (more?: MoreVolumes, options?: { msize?: number; uid?: number }) => Promise<Share> {
  let stack = new AsyncDisposableStack();
  afterEach(async () => {
    await stack.disposeAsync();
    stack = new AsyncDisposableStack();
  });
  return async (more = () => [], options = {}) => {
    const folder = mkdtempSync(path.join(tmpdir(), 'kiln-v'));
    stack.defer(() => rmSync(folder, { recursive: true, force: true }));
    const [directory, source] = [path.join(folder, 'sandbox'), path.join(folder, 'source')];
    mkdirSync(directory);
    mkdirSync(source);
    const server = stack.use(await VolumeServer.start({ program, directory }));
    await server.add([{ source }, ...more(folder)].map(volume));
    const [ours, theirs] = socketPair();
    const socket = new Socket({ fd: ours });
    stack.defer(() => void socket.destroy());
    await server.serve(theirs);
    return { folder, source, directory, server, client: await NinePClient.open(socket, options) };
  };
}
