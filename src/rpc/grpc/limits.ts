/**
 * HTTP/2's flow control of what comes from a server, for streams of 64 KiB to 1 MiB messages over one fast local connection.
 *
 * RFC 9113 starts with windows of 65,535 bytes, which cost a round trip for each chunk. Node takes bytes out of the
 * connection's window as soon as they arrive and out of a stream's only when they are read, so a stream that nobody
 * reads holds `streamWindow` bytes in the receiver and never holds up the others.
 *
 * What goes to a server keeps RFC 9113's windows, 65,535 bytes for all streams together, which the sockets on the way hold.
 * Node stops receiving while one of its writes waits for room: with much on its way in both directions, both ends would wait
 * for each other for ever. So one end, the client, must always be able to write.
 */

/** Bytes that one stream may carry ahead of its reader; also about what an unread stream costs in memory. */
export const streamWindow = 1 << 20;

/** Bytes of all streams together that may be on their way. */
export const connectionWindow = 4 << 20;

/** Largest message to a server in bytes; more is RESOURCE_EXHAUSTED. An OCI spec can have a megabyte. */
export const maxMessageBytes = 16 << 20;

/**
 * Largest message to a client in bytes. The peer may be hostile, and decoding makes up to fifty bytes of objects out of
 * one. The longest honest answer is the list of a container's processes: a megabyte has room for 80,000.
 */
export const maxAnswerBytes = 1 << 20;
