#!/bin/sh
# Make the certificates of this folder anew; see README.md.
set -eu
cd "$(dirname "$0")"
WORK=$(mktemp -d)
SPAN="-startdate 20200101000000Z -enddate 21191231235959Z"
cat > "$WORK/ca.cnf" <<EOF
[ca]
default_ca = here
[here]
database = $WORK/index
new_certs_dir = $WORK
rand_serial = yes
default_md = sha256
policy = any
[any]
commonName = supplied
[authority]
basicConstraints = critical,CA:true
[member]
basicConstraints = critical,CA:false
[req]
distinguished_name = name
[name]
EOF
touch "$WORK/index"
request() {  # request FILE NAME
    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -config "$WORK/ca.cnf" -subj "/CN=$2" \
        -keyout "$WORK/$1.key" -out "$WORK/$1.csr"
}
authority() {  # authority FILE NAME
    request "$1" "$2"
    openssl ca -batch -notext -config "$WORK/ca.cnf" $SPAN -extensions authority -selfsign -keyfile "$WORK/$1.key" \
        -in "$WORK/$1.csr" -out "$1.pem"
}
member() {  # member FILE AUTHORITY
    request "$1" "$1"
    openssl ca -batch -notext -config "$WORK/ca.cnf" $SPAN -extensions member -cert "$2.pem" -keyfile "$WORK/$2.key" \
        -in "$WORK/$1.csr" -out "$1.pem"
    cp "$WORK/$1.key" .
}
authority authority "test cell"
authority other-authority "another cell"
member member authority
member stranger other-authority
rm other-authority.pem
rm -r "$WORK"
