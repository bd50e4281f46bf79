/**
 * From directories to an erofs image, by mkfs.erofs.
 *
 * Layers are merged by the one who knows best how: the kernel. A shell in a private mount namespace mounts a read-only
 * overlay of them and runs mkfs.erofs over it; the namespace and the mount in it end with the shell, whatever happens
 * to anybody. The layers are named by symbolic links 0, 1, 2 … in a scratch directory: so no path needs escaping, and
 * hundreds of layers fit into the page that mount(2) takes for options.
 *
 * mkfs.erofs 1.5 (Debian 12) needs care, found in its source and by the tests:
 * - its scan for shared xattrs stops at whiteouts that are left in directories which are no merge of several layers
 *   (the kernel lists them, stat(2) says ENOENT). `-x INT_MAX` skips the scan, and --exclude-path the whiteouts.
 * - it leaves out every file whose name begins with "lost+found" (until 1.6) and cuts names of 255 bytes (until 1.8.5).
 *   A survey by find(1), side by side, turns that into an error.
 * - it does not look at the result of some of its writes: any error line counts as failure, whatever the exit code.
 * Version 1.7 writes corrupt directories (erofs-utils commit 8cbc205) and is refused.
 */
import { mkdir, readFile, statfs, symlink } from 'node:fs/promises';
import { join } from 'node:path';
import { KilnError } from '../errors.ts';
import { errnoCode } from './file-error.ts';
import { lastLine, runTool, type ToolResult } from './tool.ts';

/** A tree to convert: one directory as it is, or several merged as overlayfs does, the topmost first. */
export type Tree =
  | { readonly kind: 'directory'; readonly path: string }
  | { readonly kind: 'layers'; readonly paths: readonly string[]; readonly userxattr: boolean };

export interface Conversion {
  readonly tree: Tree;
  /** An empty directory of the caller's, on the filesystem of the image. The image is made in it. */
  readonly scratch: string;
  readonly uuid: string;
  /** The program, a name or a path. */
  readonly mkfsErofs: string;
  /** What the image will be called, for errors. */
  readonly imageName: string;
  readonly signal: AbortSignal;
}

/** The longest chain that the kernel's overlayfs merges (OVL_MAX_STACK), less the empty layer that we add. */
const maxLayers = 499;

/** A disk with less free than this has been filled up by the conversion. */
const fullDiskBytes = 4 * 1024 * 1024;

const hint = 'install erofs-utils and util-linux';

/**
 * -x INT_MAX: no shared xattrs (a scan of the whole tree less). Extended inodes hold every time stamp, owner and size;
 * compact ones would fall back to the image's time.
 */
const mkfsOptions = ['--quiet', '-x2147483647', '-Eforce-inode-extended'] as const;

/**
 * Parameters: mkfs.erofs, UUID, tree, overlay options or "", pattern set to survey or "", "hide" to leave out whiteouts.
 * `wait` lets the survey end before the namespace does.
 */
const script = `
mkfs=$1 uuid=$2 tree=$3 overlay=$4 survey=$5 whiteouts=$6
if [ -n "$overlay" ]; then mount -t overlay -o "$overlay" overlay "$tree" || exit; fi
case $survey in
names) find "$tree" -name '${'?'.repeat(255)}' -print -quit >survey & ;;
all) find "$tree" '(' -name '${'?'.repeat(255)}' -o -name 'lost+found*' ! '(' -name lost+found -type d -empty ')' ')' \
  -print -quit >survey & ;;
esac
if [ "$whiteouts" = hide ]; then
  find "$tree" -type c ! -exec test -e '{}' ';' -printf '--exclude-path=%P\\0' |
    xargs -0 -x -n 100000 "$mkfs" ${mkfsOptions.join(' ')} "-U$uuid" image "$tree"
else
  "$mkfs" ${mkfsOptions.join(' ')} "-U$uuid" image "$tree"
fi
status=$?
wait
exit $status
`;

/**
 * Makes an erofs image of a tree and returns its path in the scratch directory. On failure the scratch directory holds
 * debris, which is the caller's to remove.
 *
 * @throws KilnError resource-exhausted when the disk is full; internal when mkfs.erofs fails; unimplemented for a file
 *   name that the installed mkfs.erofs cannot store; the signal's reason when aborted
 */
export async function convertToErofs(conversion: Conversion): Promise<string> {
  const { tree, scratch, mkfsErofs, uuid, signal } = conversion;
  const version = await mkfsErofsVersion(mkfsErofs);
  let source: string;
  let overlay = '';
  if (tree.kind === 'directory') {
    source = tree.path;
  } else {
    source = 'tree';
    overlay = await layOut(tree, scratch);
  }
  const run = (whiteouts: 'keep' | 'hide') => {
    const args = [script, 'sh', mkfsErofs, uuid, source, overlay, surveyFor(version), whiteouts];
    const unshare = ['--mount', '--propagation', 'private', '--', 'sh', '-c', ...args];
    return runTool('unshare', unshare, { cwd: scratch, signal, hint });
  };
  let result = await run('keep');
  // Whiteouts are rare outside of merged directories, and looking for them takes a walk through the tree.
  if (overlay !== '' && failed(result) && result.output.includes('No such file or directory')) {
    result = await run('hide');
  }
  await refuseUnstorableName(conversion);
  if (failed(result)) throw await conversionError(conversion, result);
  return join(scratch, 'image');
}

/** Puts links to the layers and the mount point into the scratch directory; returns the overlay's options. */
async function layOut(tree: Tree & { kind: 'layers' }, scratch: string): Promise<string> {
  const { paths, userxattr } = tree;
  if (paths.length > maxLayers) {
    throw new KilnError(
      'unimplemented',
      `the image has ${paths.length} layers, the kernel merges at most ${maxLayers}`,
      {
        hint: 'flatten the image',
      },
    );
  }
  await Promise.all([
    mkdir(join(scratch, 'tree')),
    // A read-only overlay has at least two layers; under an image of one layer lies an empty one.
    mkdir(join(scratch, 'empty')),
    ...paths.map((path, index) => symlink(path, join(scratch, String(index)))),
  ]);
  const lowerdir = [...paths.keys(), 'empty'].join(':');
  return `ro,lowerdir=${lowerdir}${userxattr ? ',userxattr' : ''}`;
}

function failed({ code, output }: ToolResult): boolean {
  return code !== 0 || /^<E>/m.test(output);
}

async function refuseUnstorableName({ scratch, tree, mkfsErofs }: Conversion): Promise<void> {
  const found = await readFile(join(scratch, 'survey'), 'utf8').catch((error: unknown) => {
    if (errnoCode(error) === 'ENOENT') return '';
    throw error;
  });
  if (found === '') return;
  const root = tree.kind === 'directory' ? tree.path : 'tree';
  const name = found.trimEnd().slice(root.length);
  throw new KilnError('unimplemented', `${mkfsErofs} cannot store the name of the image's file ${name}`, {
    hint: 'install erofs-utils 1.8.5 or newer (1.6 is enough for names that begin with "lost+found")',
  });
}

async function conversionError(conversion: Conversion, result: ToolResult): Promise<KilnError> {
  const { imageName, tree, scratch, mkfsErofs } = conversion;
  const sources = tree.kind === 'directory' ? tree.path : tree.paths.join(', ');
  const message = `cannot convert ${sources} to the image ${imageName}: ${mkfsErofs}: ${errorLine(result)}`;
  // mkfs.erofs reports a full disk as an input/output error when it sees it late.
  const { bavail, bsize } = await statfs(scratch);
  if (result.output.includes('No space left on device') || bavail * bsize < fullDiskBytes) {
    return new KilnError('resource-exhausted', message, { hint: 'free space in the cache folder, or move it' });
  }
  return new KilnError('internal', message);
}

function errorLine(result: ToolResult): string {
  const errors = result.output.split('\n').filter((line) => line.startsWith('<E>'));
  return (
    errors
      .at(-1)
      ?.replace(/^<E>\s*/, '')
      .replaceAll(/\s+/g, ' ') ?? lastLine(result)
  );
}

type Version = readonly [major: number, minor: number, patch: number];

const versions = new Map<string, Promise<Version>>();

/** The version of mkfs.erofs, asked once per program. */
function mkfsErofsVersion(program: string): Promise<Version> {
  const known = versions.get(program);
  if (known !== undefined) return known;
  const asked = askVersion(program);
  versions.set(program, asked);
  asked.catch(() => versions.delete(program));
  return asked;
}

async function askVersion(program: string): Promise<Version> {
  // Releases before 1.8 do not know -V and print their version before the complaint.
  const { output } = await runTool(program, ['-V'], { hint });
  const match = /mkfs\.erofs\D* (\d+)\.(\d+)(?:\.(\d+))?/.exec(output);
  if (match === null) {
    throw new KilnError('failed-precondition', `${program} does not say its version, is it mkfs.erofs?`, { hint });
  }
  const version: Version = [Number(match[1]), Number(match[2]), Number(match[3] ?? 0)];
  if (match[1] === '1' && match[2] === '7' && version[2] === 0) {
    throw new KilnError('failed-precondition', `${program} 1.7 is known to write corrupt images`, {
      hint: 'install another release of erofs-utils',
    });
  }
  return version;
}

function surveyFor(version: Version): 'all' | 'names' | '' {
  if (isBefore(version, [1, 6, 0])) return 'all';
  return isBefore(version, [1, 8, 5]) ? 'names' : '';
}

function isBefore([major, minor, patch]: Version, other: Version): boolean {
  return (major - other[0] || minor - other[1] || patch - other[2]) < 0;
}
