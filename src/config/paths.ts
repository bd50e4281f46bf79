/**
 * Where Kiln keeps its files: from the environment, with defaults. The `kiln` command needs no more than
 * this, so this file pulls in neither the TOML parser nor the validator.
 */
import { isAbsolute, normalize } from 'node:path';
import { KilnError } from '../errors.ts';

export interface KilnPaths {
  /** The configuration file (KILN_CONFIG). */
  readonly configFile: string;
  /** False when `configFile` is the default place, where a missing file just means: defaults. */
  readonly configFileIsExplicit: boolean;
  /** Sockets, locks, log (KILN_STATE_DIR). Each state folder has its own kilnd. */
  readonly stateDir: string;
  /** Converted layers, and the writable layers of native snapshots (KILN_CACHE_DIR). */
  readonly cacheDir: string;
  /** Guest kernel, initrd and image (KILN_GUEST_DIR). */
  readonly guestDir: string;
}

export const defaultPaths = {
  configFile: '/etc/kiln/config.toml',
  stateDir: '/run/kiln',
  cacheDir: '/var/lib/kiln',
} as const;

export interface PathsOptions {
  readonly env: NodeJS.ProcessEnv;
  /** Where the guest files lie beside this build of Kiln, for when KILN_GUEST_DIR is not set. */
  readonly guestDir: string;
}

/** @throws KilnError invalid-argument when a variable holds a path that is not absolute. An empty one counts as unset. */
export function pathsFromEnv({ env, guestDir }: PathsOptions): KilnPaths {
  return {
    configFile: pathFrom(env, 'KILN_CONFIG') ?? defaultPaths.configFile,
    configFileIsExplicit: (env.KILN_CONFIG ?? '') !== '',
    stateDir: pathFrom(env, 'KILN_STATE_DIR') ?? defaultPaths.stateDir,
    cacheDir: pathFrom(env, 'KILN_CACHE_DIR') ?? defaultPaths.cacheDir,
    guestDir: pathFrom(env, 'KILN_GUEST_DIR') ?? guestDir,
  };
}

function pathFrom(env: NodeJS.ProcessEnv, name: string): string | undefined {
  const value = env[name] ?? '';
  if (value === '') return undefined;
  if (!isAbsolute(value)) {
    throw new KilnError('invalid-argument', `${name}=${JSON.stringify(value)}: must be an absolute path`, {
      hint: 'containerd starts Kiln in another working directory, so a relative path would not be found',
    });
  }
  // "/run/kiln/" and "/run/kiln" must be the same state folder.
  const normal = normalize(value);
  return normal.length > 1 && normal.endsWith('/') ? normal.slice(0, -1) : normal;
}
