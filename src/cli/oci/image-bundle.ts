/**
 * Bundles that are made of an image's archive: folders of Kiln's own below KILN_CACHE_DIR, which live as long as their
 * containers. What one that was killed has left is removed by the next.
 */
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { pathsFromEnv } from '../../config/paths.ts';
import { identityOf, identityRecord, isAlive } from '../../host/process-identity.ts';
import { Archive } from '../../image/archive.ts';
import { findImage, unpackImage } from '../../image/image.ts';
import { userOf } from '../../image/user.ts';
import { imageSpec } from '../../oci/image-spec.ts';
import { type ContainerStates, idInUse } from './container-state.ts';

export interface ImageBundleOptions {
  readonly id: string;
  /** The archive's path. */
  readonly image: string;
  readonly imageName?: string | undefined;
  readonly command: readonly string[];
  readonly terminal: boolean;
}

/** Who has made the folder, and whose bundle it is. */
const ownerFile = 'owner.json';

interface Owner {
  readonly identity: unknown;
  readonly root: string;
  readonly id: string;
}

function bundlesFolder(): string {
  return path.join(pathsFromEnv({ env: process.env, guestDir: '/' }).cacheDir, 'oci-bundles');
}

/**
 * Unpacks an image to a new bundle.
 *
 * @returns the bundle's folder
 * @throws KilnError; then nothing is left of it
 */
export async function makeImageBundle(states: ContainerStates, options: ImageBundleOptions): Promise<string> {
  if (existsSync(states.directory(options.id))) throw idInUse(options.id);
  const folder = bundlesFolder();
  mkdirSync(folder, { recursive: true, mode: 0o700 });
  sweep(folder);
  const bundle = mkdtempSync(path.join(folder, 'bundle-'));
  try {
    const owner: Owner = { identity: identityOf(process.pid), root: states.root, id: options.id };
    writeFileSync(path.join(bundle, ownerFile), JSON.stringify(owner));
    await fill(bundle, options);
    return bundle;
  } catch (error) {
    rmSync(bundle, { recursive: true, force: true });
    throw error;
  }
}

/** Removes a bundle if it is one of these. */
export function removeImageBundle(bundle: string): void {
  if (path.dirname(bundle) === bundlesFolder()) rmSync(bundle, { recursive: true, force: true });
}

async function fill(bundle: string, { id, image, imageName, command, terminal }: ImageBundleOptions): Promise<void> {
  const root = path.join(bundle, 'rootfs');
  const scratch = path.join(bundle, 'archive.tar');
  mkdirSync(root, { mode: 0o755 });
  const archive = await Archive.open(path.resolve(image), scratch);
  const found = await findImage(archive, imageName);
  const warn = (message: string) => process.stderr.write(`kiln: warning: ${message}\n`);
  await unpackImage(archive, found, { root, warn });
  rmSync(scratch, { force: true });
  const config = found.config.config ?? {};
  const user = userOf(root, config.User ?? '');
  const hostname = id.replaceAll(/[^A-Za-z0-9.-]/g, '-').slice(0, 63);
  const spec = imageSpec({ image: config, command, user, hostname, terminal });
  writeFileSync(path.join(bundle, 'config.json'), JSON.stringify(spec, undefined, '\t'), { flag: 'wx' });
}

/** Removes bundles whose makers have ended without a container. */
function sweep(folder: string): void {
  for (const name of readdirSync(folder)) {
    const bundle = path.join(folder, name);
    if (!isAbandoned(bundle)) continue;
    rmSync(bundle, { recursive: true, force: true });
  }
}

function isAbandoned(bundle: string): boolean {
  try {
    const { identity, root, id } = JSON.parse(readFileSync(path.join(bundle, ownerFile), 'utf8')) as Owner;
    if (isAlive(identityRecord.parse(identity))) return false;
    const state = JSON.parse(readFileSync(path.join(root, id, 'state.json'), 'utf8')) as { bundle?: unknown };
    return state.bundle !== bundle;
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    // Without an owner it is just being made.
    return code === 'ENOENT' && readdirSync(bundle).includes(ownerFile);
  }
}
