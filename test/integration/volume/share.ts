/** A file server with one volume or more, and a raw client at its connection. */
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { Socket } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { type Volume, VolumeServer } from '../../../src/volume/server.ts';
import { NinePClient } from '../../support/ninep.ts';
import { projectRoot } from '../../support/paths.ts';
import { socketPair } from '../../support/socket-pair.ts';

export const program = path.join(projectRoot, 'dist', 'libexec', 'kiln-volumes');

export function volume(source: string, options: Partial<Volume> = {}): Volume {
  return { source, readOnly: false, recursive: false, follows: false, ...options };
}

export class Share implements AsyncDisposable {
  readonly folder: string;
  /** Of volume 0. */
  readonly source: string;
  readonly server: VolumeServer;
  readonly client: NinePClient;

  private constructor(folder: string, source: string, server: VolumeServer, client: NinePClient) {
    this.folder = folder;
    this.source = source;
    this.server = server;
    this.client = client;
  }

  /** Volume 0 is an empty directory of this share, and those after it are what is asked for. */
  static async make(
    more: (folder: string) => readonly Volume[] = () => [],
    options: { msize?: number; uid?: number } = {},
  ): Promise<Share> {
    const folder = mkdtempSync(path.join(tmpdir(), 'kiln-v'));
    const directory = path.join(folder, 'sandbox');
    const source = path.join(folder, 'source');
    mkdirSync(directory);
    mkdirSync(source);
    const server = await VolumeServer.start({ program, directory });
    try {
      await server.add([volume(source), ...more(folder)]);
      const [ours, theirs] = socketPair();
      await server.serve(theirs);
      const client = await NinePClient.open(new Socket({ fd: ours }), options);
      return new Share(folder, source, server, client);
    } catch (error) {
      await server[Symbol.asyncDispose]();
      rmSync(folder, { recursive: true, force: true });
      throw error;
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.client[Symbol.dispose]();
    await this.server[Symbol.asyncDispose]();
    rmSync(this.folder, { recursive: true, force: true });
  }
}
